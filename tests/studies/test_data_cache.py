"""The cache: atomic, checked, remade with a warning; downloads that go on where they were."""

import errno
import hashlib
import io
import json
import os
import subprocess
import threading
import urllib.request
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import URLError
from urllib.response import addinfourl

import numpy as np
import pytest

from kronscope.studies.data import cache, download, source


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Recipe:
    """Counts how often it is followed."""

    made = 0

    def __call__(self):
        self.made += 1
        return {"a": np.arange(6).reshape(2, 3), "b": np.arange(4, dtype=np.uint8)}


def test_made_once(folder):
    recipe = Recipe()
    for _ in range(2):
        found = cache.cached("one-1", recipe)
        np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
        assert found["b"].dtype == np.uint8
    assert recipe.made == 1
    assert sorted(os.listdir(folder)) == ["one-1.npz", "one-1.npz.sha256"]
    cache.cached("one-2", recipe)  # another version is another entry
    assert recipe.made == 2


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "a wrong bit": change_a_byte,
    "without its checksum": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "checksum of another": lambda path: path.with_name(path.name + ".sha256").write_text("0" * 64),
    "checksum no text": lambda path: path.with_name(path.name + ".sha256").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(folder, damage):
    recipe = Recipe()
    cache.cached("one", recipe)
    damage(folder / "one.npz")
    with pytest.warns(UserWarning, match=r"one\.npz does not fit its checksum: it is made again"):
        found = cache.cached("one", recipe)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert recipe.made == 2
    cache.cached("one", recipe)
    assert recipe.made == 2


def test_an_interrupted_entry_leaves_nothing(folder, monkeypatch):
    def interrupted(file, **_):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.cached("one", Recipe())
    assert os.listdir(folder) == []
    recipe = Recipe()
    cache.cached("one", recipe)
    assert recipe.made == 1


def test_a_folder_that_cannot_be_written_is_no_obstacle(folder):
    folder.write_text("a file, not a folder")
    with pytest.warns(UserWarning, match=r"could not be written .* set KRONSCOPE_CACHE to"):
        found = cache.cached("one", Recipe())
    assert found["b"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("variable", ["KRONSCOPE_CACHE", "SCIKIT_LEARN_DATA"])
def test_a_download_into_a_folder_that_cannot_be_written_does_not_begin(
    tmp_path, monkeypatch, variable
):
    """A file in its place, for root may write to any folder."""
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit_learn"))
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "below"))
    asked = []
    said = (
        rf"{tmp_path / 'file' / 'below'}, in which .* cannot be written .*; set {variable} to one"
    )
    with pytest.raises(ValueError, match=said):
        source.fetched("a set", "set/*", lambda: asked.append(1))
    assert not asked


def test_a_full_disk_is_no_missing_network(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit_learn"))

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match=rf"could not be kept .*No space.* \(now {folder} and"):
        source.fetched("a set", "set/*", full)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.delenv("KRONSCOPE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr("sys.platform", "linux")
    assert cache.folder() == Path("/somewhere/kronscope")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "kronscope"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache.folder() == Path.home() / "Library" / "Caches" / "kronscope"
    monkeypatch.setattr("sys.platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", "/local")
    assert cache.folder() == Path("/local/kronscope")


CONTENT = np.random.default_rng(0).bytes(3 * download.LARGE)


class Server(BaseHTTPRequestHandler):
    """Serves CONTENT; `cut` limits the bytes of an answer, `tag` is its ETag."""

    asked: list[str | None] = []  # noqa: RUF012
    cut: int | None = None
    tag = '"first"'

    def do_GET(self):
        asked = self.headers.get("Range")
        Server.asked.append(asked)
        begun = int(asked[6:-1]) if asked and self.headers["If-Range"] == Server.tag else 0
        if begun >= len(CONTENT):
            self.send_error(416)
            return
        self.send_response(206 if begun else 200)
        self.send_header("ETag", Server.tag)
        self.send_header("Content-Length", str(len(CONTENT) - begun))
        if begun:
            self.send_header("Content-Range", f"bytes {begun}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        body = CONTENT[begun:]
        self.wfile.write(body if Server.cut is None else body[: Server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def address(monkeypatch):
    monkeypatch.setattr(Server, "asked", [])
    monkeypatch.setattr(Server, "cut", None)
    monkeypatch.setattr(Server, "tag", '"first"')
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/set.arff?signature=1"
        server.shutdown()
        thread.join()


def get(address, parts):
    with (
        download.downloads("a set", parts),
        urllib.request.urlopen(urllib.request.Request(address)) as response,
    ):
        assert response.info()["ETag"]
        return b"".join(iter(lambda: response.read(100_000), b""))


def test_a_download_in_one_go(tmp_path, address):
    assert get(address, tmp_path / "parts") == CONTENT
    assert Server.asked == [None]
    assert os.listdir(tmp_path / "parts") == []


def test_a_download_goes_on_where_it_was_cut_off(tmp_path, address, monkeypatch):
    parts = tmp_path / "parts"
    for cut, begun in ((1_000_000, 1_000_000), (500_000, 1_500_000)):
        monkeypatch.setattr(Server, "cut", cut)
        with pytest.raises(URLError, match=f"cut off after {begun} of {len(CONTENT)} bytes"):
            get(address, parts)
        (kept,) = os.listdir(parts)
        assert (parts / kept).read_bytes() == CONTENT[:begun]
    monkeypatch.setattr(Server, "cut", None)
    assert get(address.replace("signature=1", "signature=2"), parts) == CONTENT
    assert Server.asked == [None, "bytes=1000000-", "bytes=1500000-"]
    assert os.listdir(parts) == []


def test_what_a_killed_process_got_is_taken_over(tmp_path, address, monkeypatch):
    monkeypatch.setattr(Server, "cut", 1_000_000)
    with pytest.raises(URLError, match="cut off"):
        get(address, tmp_path)
    monkeypatch.setattr(Server, "cut", None)
    (part,) = tmp_path.iterdir()
    with subprocess.Popen(["true"]) as process:
        process.wait()
    monkeypatch.setattr(os, "getpid", lambda: process.pid)  # as that process would call it
    orphan = part.replace(download._in_use(part))
    monkeypatch.undo()
    alive = orphan.with_name(orphan.name.replace(f".{process.pid}@", f".{os.getpid()}@"))
    orphan.replace(alive)
    download._take_over(tmp_path, download._key(urllib.request.Request(address)))
    assert list(tmp_path.iterdir()) == [alive]  # its process writes to it
    alive.replace(orphan)
    assert get(address, tmp_path) == CONTENT
    assert Server.asked[-1] == "bytes=1000000-"
    assert list(tmp_path.iterdir()) == []


def test_a_download_begins_anew_when_the_file_is_another(tmp_path, address, monkeypatch):
    monkeypatch.setattr(Server, "cut", 1_000_000)
    with pytest.raises(URLError, match="cut off"):
        get(address, tmp_path)
    monkeypatch.setattr(Server, "cut", None)
    monkeypatch.setattr(Server, "tag", '"second"')
    assert get(address, tmp_path) == CONTENT
    assert os.listdir(tmp_path) == []


def test_a_part_longer_than_the_file_is_given_up(tmp_path, address, monkeypatch):
    monkeypatch.setattr(Server, "cut", 1_000_000)
    with pytest.raises(URLError, match="cut off"):
        get(address, tmp_path)
    monkeypatch.setattr(Server, "cut", None)
    (part,) = tmp_path.iterdir()
    part.write_bytes(CONTENT)
    with pytest.raises(URLError, match="416"):
        get(address, tmp_path)
    assert get(address, tmp_path) == CONTENT


def test_without_a_firm_tag_nothing_is_kept(tmp_path, address, monkeypatch):
    monkeypatch.setattr(Server, "tag", 'W/"weak"')
    monkeypatch.setattr(Server, "cut", 1_000_000)
    with pytest.raises(URLError, match="cut off"):
        get(address, tmp_path)
    assert os.listdir(tmp_path) == []


def test_the_opener_of_the_process_comes_back(tmp_path, monkeypatch):
    own = urllib.request.build_opener()
    monkeypatch.setattr(urllib.request, "_opener", own)
    with download.downloads("a set", tmp_path):
        assert urllib.request._opener is not own
    assert urllib.request._opener is own


LABELS = np.tile(np.arange(10), 3)  # 20 pictures to train, 10 to test
PIXELS = np.arange(120).reshape(30, 4)
ROWS = "\n".join(",".join(map(str, (*x, t))) for x, t in zip(PIXELS, LABELS, strict=True))
NAMES = ["a", "b", "c", "d", "class"]
KINDS = ["REAL"] * 4 + ["{0,1,2,3,4,5,6,7,8,9}"]
HEAD = [f"@ATTRIBUTE {name} {kind}" for name, kind in zip(NAMES, KINDS, strict=True)]
ARFF = "\n".join(["@RELATION tiny", *HEAD, "@DATA", ROWS, ""])
COUNTS = (2,) * 10, (1,) * 10


@pytest.fixture
def openml_site(tmp_path, monkeypatch):
    """OpenML's answers about a tiny set; gives the dictionary of them, and what was asked for."""
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit_learn"))
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KRONSCOPE_DATA", raising=False)
    description = {
        "id": "7", "name": "tiny", "version": "1", "format": "ARFF", "status": "active",
        "file_id": "9", "default_target_attribute": "class", "description": "none",
        "url": "https://www.openml.org/data/v1/download/9/tiny.arff",
        "md5_checksum": hashlib.md5(ARFF.encode()).hexdigest(),
    }  # fmt: skip
    features = [
        {"index": str(k), "name": name, "data_type": "nominal" if name == "class" else "numeric"}
        | {"is_target": str(name == "class").lower(), "is_ignore": "false"}
        | {"is_row_identifier": "false", "number_of_missing_values": "0"}
        for k, name in enumerate(NAMES)
    ]
    answers = {
        "/list/data_name/tiny/": {"data": {"dataset": [{"did": 7, "status": "active"}]}},
        "/json/data/7": {"data_set_description": description},
        "/data/features/7": {"data_features": {"feature": features}},
        "/data/qualities/7": {"data_qualities": {"quality": []}},
    }
    pages = {where: json.dumps(answer).encode() for where, answer in answers.items()}
    pages["/download/9/"] = ARFF.encode()
    asked = []

    def https_open(_, request):
        asked.append(request.full_url)
        (content,) = [page for where, page in pages.items() if where in request.full_url]
        answer = addinfourl(io.BytesIO(content), {}, request.full_url, 200)
        answer.msg = "OK"
        return answer

    monkeypatch.setattr(urllib.request.HTTPSHandler, "https_open", https_open)
    return pages, asked


def fetch_tiny():
    return source.openml("tiny", 1, "tiny/*", features=4, train=20, counts=COUNTS)


def test_scikit_learns_fetcher_reads_through_it(openml_site):
    _, asked = openml_site
    for _ in range(2):
        found = fetch_tiny()
        np.testing.assert_array_equal(found["pictures"], PIXELS)
        np.testing.assert_array_equal(found["labels"], LABELS)
        assert found["pictures"].dtype == np.uint8
    assert sum("download" in address for address in asked) == 1


@pytest.mark.filterwarnings("ignore:.*redownloading:RuntimeWarning")
def test_scikit_learn_refuses_a_file_of_another_checksum(openml_site, tmp_path):
    pages, _ = openml_site
    pages["/download/9/"] = ARFF.replace("0,1,2,3,0", "0,1,2,3,1").encode()
    with pytest.raises(ValueError, match=r"tiny was fetched but .*md5 checksum.*; run again"):
        fetch_tiny()
    pages["/download/9/"] = ARFF.encode()
    assert fetch_tiny()["labels"].tolist() == LABELS.tolist()
    assert [path.name for path in (tmp_path / "cache").glob("*.npz")] == ["openml-tiny-1.npz"]
