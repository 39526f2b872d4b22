"""Downloads: continued where they were cut off, checked, whole or not at all."""

import errno
import threading

import numpy as np
import pytest
import requests

from kronscope.studies import data
from kronscope.studies.data import download, published, source

CONTENT = np.random.default_rng(0).bytes(3 * download.PIECE)
HALF = len(CONTENT) // 2


@pytest.fixture
def get(site, tmp_path):
    """get() downloads one file of the site and returns what it holds; get.part is its part file."""
    site.files["set.bin"] = CONTENT

    def get():
        download.download(f"{site.address}/set.bin", str(tmp_path / "output"), None)
        assert not get.part.exists()
        return (tmp_path / "output").read_bytes()

    get.part = tmp_path / "set.bin.part"
    return get


def test_a_download_in_one_go(get, site):
    assert get() == CONTENT
    assert site.asked == [("set.bin", None)]


def test_a_download_goes_on_where_it_was_cut_off(get, site):
    for cut, begun in ((300_000, 300_000), (100_000, 400_000)):
        site.cut = cut
        with pytest.raises(OSError, match=f"cut off after {begun} of {len(CONTENT)} bytes"):
            get()
        assert get.part.read_bytes() == CONTENT[:begun]
    site.cut, site.status = None, 503
    with pytest.raises(OSError, match="503"):
        get()
    site.status = None
    assert get() == CONTENT
    assert [asked for _, asked in site.asked] == [
        None, "bytes=300000-", "bytes=400000-", "bytes=400000-",
    ]  # fmt: skip


@pytest.mark.parametrize("ranges", ["ignored", "wrong"])
def test_a_server_that_sends_no_ranges_sends_all(get, site, ranges):
    get.part.write_bytes(CONTENT[:HALF])
    site.ranges = ranges
    assert get() == CONTENT


def test_a_part_longer_than_the_file_is_given_up(get, site):
    get.part.write_bytes(CONTENT + b"more")
    assert get() == CONTENT
    assert site.asked[-1] == ("set.bin", None)


FILES = {"train_32x32.mat": CONTENT, "test_32x32.mat": CONTENT[:1000]}


@pytest.fixture
def svhn(nowhere, serve):
    """The folder of the cache for a made-up SVHN that is served."""
    serve("SVHN", FILES)
    return nowhere / "svhn"


def held(place):
    return {path.name: path.read_bytes() for path in place.iterdir() if path.name != ".lock"}


def test_files_are_fetched_once_and_damaged_ones_again(svhn, site):
    assert source.folder("SVHN") == svhn
    assert held(svhn) == FILES
    with data.without_downloads():
        assert source.folder("SVHN") == svhn
    assert [path for path, _ in site.asked] == list(FILES)
    (svhn / "test_32x32.mat").write_bytes(b"damaged")
    with data.without_downloads(), pytest.raises(FileNotFoundError, match="nothing is fetched"):
        source.folder("SVHN")
    source.folder("SVHN")
    assert held(svhn) == FILES
    assert [path for path, _ in site.asked] == [*FILES, "test_32x32.mat"]


def test_files_of_an_archive_are_held_to_their_checksums(nowhere, serve, site):
    files = {"train.bin": CONTENT, "test.bin": CONTENT[:99]}
    serve("CIFAR-100", files)
    for name in (None, *files):
        if name is not None:
            (nowhere / "cifar100" / name).write_bytes(b"damaged")
        source.folder("CIFAR-100")
        assert files.items() <= held(nowhere / "cifar100").items()
    assert [path for path, _ in site.asked] == ["cifar-100-binary.tar.gz"]


def test_other_content_than_published_is_refused_and_not_kept(svhn, site):
    site.files["train_32x32.mat"] = CONTENT[:-1] + b"?"
    with pytest.raises(
        ValueError, match=r"SVHN was fetched but .*SHA256 hash.* run again"
    ) as error:
        source.folder("SVHN")
    assert published.SERVED["SVHN"]["train_32x32.mat"] in str(error.value)
    assert held(svhn) == {}
    site.files |= FILES
    source.folder("SVHN")
    assert held(svhn) == FILES


def test_a_part_of_another_file_is_noticed(svhn):
    svhn.mkdir(parents=True)
    (svhn / "train_32x32.mat.part").write_bytes(bytes(HALF))
    with pytest.raises(ValueError, match="run again"):
        source.folder("SVHN")
    source.folder("SVHN")
    assert held(svhn) == FILES


def test_processes_that_want_the_same_files_fetch_them_once(svhn, site):
    workers = [threading.Thread(target=source.folder, args=("SVHN",)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert held(svhn) == FILES
    assert sorted(path for path, _ in site.asked) == sorted(FILES)


def test_a_cut_off_download_says_what_to_do(svhn, site):
    site.cut = 5
    with pytest.raises(FileNotFoundError, match=r"nor could it be fetched \(.*cut off after 5 of"):
        source.folder("SVHN")
    site.cut = None
    source.folder("SVHN")
    assert site.asked[1] == ("train_32x32.mat", "bytes=5-")
    assert held(svhn) == FILES


def test_a_download_into_a_folder_that_cannot_be_written_does_not_begin(svhn, site):
    """A file in its place, for root may write to any folder."""
    svhn.parent.touch()
    with pytest.raises(ValueError, match=rf"kept in {svhn} .* set KRONSCOPE_CACHE to a folder"):
        source.folder("SVHN")
    assert not site.asked


@pytest.mark.usefixtures("svhn")
def test_a_full_disk_is_no_missing_network(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_write", full)
    with pytest.raises(ValueError, match=r"SVHN could not be kept in .*No space.* and has room"):
        source.folder("SVHN")


SETS = {
    "mnist": (data.mnist, "mnist/*.gz"),
    "fashion": (data.fashion_mnist, "fashion-mnist/*.gz"),
    "cifar10": (data.cifar10, "cifar10/*.bin"),
    "cifar10_subset": (data.cifar10_subset, "cifar10/*.bin"),
    "cifar100": (data.cifar100, "cifar100/*.bin"),
    "svhn": (data.svhn, "svhn/*_32x32.mat"),
    "olivetti": (data.olivetti, "olivetti/olivettifaces.mat"),
    "faces": (data.faces, "olivetti/olivettifaces.mat"),
}


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(("read", "files"), SETS.values(), ids=SETS)
def test_a_set_that_is_nowhere(monkeypatch, read, files):
    def offline(*_, **__):
        raise requests.ConnectionError("no route to host")

    monkeypatch.setattr(requests, "get", offline)
    with pytest.raises(FileNotFoundError, match=r"\(KRONSCOPE_DATA is None\).* route") as error:
        read()
    assert f"set KRONSCOPE_DATA to a folder with {files} or go online" in str(error.value)


def test_a_folder_of_data_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"KRONSCOPE_DATA is .*none', which is no folder"):
        data.mnist()


def test_checksums_are_whole():
    tables = [*published.PUBLISHED.values(), *published.SERVED.values(), published.ARCHIVES]
    for digest in (digest for table in tables for digest in table.values()):
        assert len(digest) in published.KINDS
        int(digest, 16)
    assert published.SOURCES.keys() <= published.PUBLISHED.keys()
