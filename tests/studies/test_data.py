"""Data sets: real files where they are, else the fetchers, and clear errors where neither is."""

import gzip
import os
import struct

import numpy as np
import pytest
import sklearn.datasets
import torch
from scipy.io import savemat

from kronscope.studies import data, problems
from kronscope.studies.data import colour, digit
from kronscope.studies.training import loop as training

needs_files = pytest.mark.skipif(
    "KRONSCOPE_DATA" not in os.environ, reason="$KRONSCOPE_DATA is not set: no real files"
)
needs_fashion = pytest.mark.skipif(
    not os.path.isdir(os.path.join(os.environ.get("KRONSCOPE_DATA", "/nowhere"), "fashion-mnist")),
    reason="needs the real files in $KRONSCOPE_DATA/fashion-mnist",
)


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No folder of data, an empty cache."""
    monkeypatch.delenv("KRONSCOPE_DATA", raising=False)
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit_learn"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of data and an empty cache."""
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path))
    monkeypatch.setenv("KRONSCOPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path / "scikit_learn"))
    return tmp_path


def test_digits_are_the_real_ones():
    found = data.digits()
    assert found.train_inputs.shape == (1500, 64)
    assert found.test_inputs.shape == (297, 64)
    assert found.train_inputs.dtype == torch.float32
    assert found.train_inputs is found.train_targets
    everything = torch.cat([found.train_inputs, found.test_inputs])
    pixels = sklearn.datasets.load_digits().data / 16
    assert everything.sum().item() == pytest.approx(pixels.sum(), rel=1e-6)
    assert 0 <= everything.min() < everything.max() == 1


IDX_SETS = {
    "mnist": (data.mnist, "mnist"),
    "mnist16": (data.mnist16, "mnist"),
    "mnist_sequences": (data.mnist_sequences, "mnist"),
    "fashion": (data.fashion_mnist, "fashion-mnist"),
    "fashion_pictures": (data.fashion_mnist_pictures, "fashion-mnist"),
}


@pytest.mark.parametrize(("read", "name"), IDX_SETS.values(), ids=IDX_SETS)
def test_a_folder_without_its_files(folder, read, name):
    (folder / name).mkdir()
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz is missing"):
        read()


def test_a_folder_of_data_that_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match=r"KRONSCOPE_DATA is .*none', which is no folder"):
        data.mnist()


def offline(*_, **__):
    raise OSError("no route to host")


SETS = {  # what each says that can be fetched
    "mnist": (data.mnist, "mnist/*.gz"),
    "fashion": (data.fashion_mnist, "fashion-mnist/*.gz"),
    "cifar10": (data.cifar10, "cifar10/*.bin"),
    "cifar10_subset": (data.cifar10_subset, "cifar10/*.bin"),
    "svhn": (data.svhn, "svhn/*_32x32.mat"),
    "olivetti": (data.olivetti, "olivetti/olivettifaces.mat"),
    "faces": (data.faces, "olivetti/olivettifaces.mat"),
    "cifar100": (data.cifar100, "cifar100/*.bin"),  # not fetched
}


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(("read", "files"), SETS.values(), ids=SETS)
def test_a_set_that_is_nowhere(monkeypatch, read, files):
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", offline)
    with pytest.raises(FileNotFoundError, match=r"\(KRONSCOPE_DATA is None\)") as error:
        read()
    assert f"set KRONSCOPE_DATA to a folder with {files} or go online" in str(error.value)


class Bunch:
    """What scikit-learn's fetchers give, its labels as text."""

    def __init__(self, pictures, labels):
        self.data, self.target = pictures, labels.astype(str)


def published_labels(*counts):
    return np.concatenate([np.repeat(np.arange(10), each) for each in counts])


def stand_in(monkeypatch, bunch):
    """Replaces fetch_openml; returns what it is asked for."""
    asked = []

    def fetch(name, **keywords):
        asked.append((name, keywords))
        return bunch

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    return asked


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize(
    ("read", "published"),
    [(data.mnist, digit.MNIST), (data.fashion_mnist, digit.FASHION)],
    ids=["mnist", "fashion"],
)
def test_fetched_once_where_no_folder_is_named(monkeypatch, read, published):
    labels = published_labels(published.train, published.test)
    asked = stand_in(monkeypatch, Bunch(np.full((70000, 784), 255, np.uint8), labels))
    for _ in range(2):  # the second from the cache
        found = read()
        assert found.train_inputs.shape == (60000, 784)
        assert found.test_inputs.shape == (10000, 784)
        assert found.test_inputs.max() == 1
    assert [name for name, _ in asked] == [published.name]
    assert asked[0][1]["version"] == 1


@pytest.mark.usefixtures("folder")
def test_fetched_where_the_folder_lacks_the_set(monkeypatch):
    labels = published_labels(digit.FASHION.train, digit.FASHION.test)
    pictures = np.zeros((70000, 784), np.uint8)
    pictures[0, 28 + 2] = 51
    stand_in(monkeypatch, Bunch(pictures, labels))
    found = data.fashion_mnist_pictures()
    assert found.train_inputs.shape == (60000, 1, 28, 28)
    assert found.train_inputs[0, 0, 1, 2].item() == pytest.approx(0.2)
    assert found.test_targets.bincount().tolist() == [1000] * 10


@pytest.mark.usefixtures("nowhere")
def test_fetched_in_another_order_is_refused(monkeypatch):
    labels = np.sort(published_labels(digit.MNIST.train, digit.MNIST.test))
    stand_in(monkeypatch, Bunch(np.zeros((70000, 784), np.uint8), labels))
    with pytest.raises(ValueError, match=r"OpenML's mnist_784, .* not in the published order; set"):
        data.mnist()


@pytest.mark.usefixtures("nowhere")
def test_a_damaged_download_is_named(monkeypatch):
    def damaged(*_, **__):
        raise ValueError("md5 checksum of local file does not match description")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", damaged)
    with pytest.raises(ValueError, match=r"mnist_784 was fetched but .*md5 checksum.* run again"):
        data.mnist()


@pytest.mark.usefixtures("nowhere")
def test_fetched_cifar10(monkeypatch):
    """Each picture filled with its place in its batch, modulo 256."""
    labels = np.tile(np.arange(10), 6000)
    places = np.arange(60000) % 10000 % 256
    pictures = np.broadcast_to(places[:, None], (60000, 3072)).astype(np.uint8)
    asked = stand_in(monkeypatch, Bunch(pictures, labels))
    found = data.cifar10_subset()
    assert asked[0][0] == "CIFAR_10"
    assert found.train_inputs.shape == (8068, 3, 32, 32)
    assert found.test_targets.tolist() == [k % 10 for k in range(1017)]
    red = found.train_inputs[[5, 4005], 0, 0, 0]  # the sixth of the first and of the second batch
    expected = (5 / 255 - data.CIFAR_MEAN[0]) / data.CIFAR_STD[0]
    assert red.tolist() == pytest.approx([expected] * 2, rel=1e-5)


def test_cifar100(folder, monkeypatch, publish):
    monkeypatch.setattr(colour, "CIFAR100_FILES", {"train.bin": 3, "test.bin": 3})
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    (folder / "cifar100").mkdir()
    random = np.random.default_rng(0)
    for name in ("train.bin", "test.bin"):
        records = random.integers(256, size=(3, 3074), dtype=np.uint8)
        records[:, :2] = [(1, 99), (2, 0), (3, 42)]
        records.tofile(folder / "cifar100" / name)
        publish("CIFAR-100", name, records.tobytes())
    found = data.cifar100()
    assert found.test_targets.tolist() == [99, 0, 42]
    green = records[1, 2 + 1024 + 3 * 32 + 4] / 255  # row 3, column 4
    expected = (green - data.CIFAR100_MEAN[1]) / data.CIFAR100_STD[1]
    assert found.test_inputs[1, 1, 3, 4].item() == pytest.approx(expected, rel=1e-5)
    (folder / "cifar100" / "test.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.bin is missing; expected a CIFAR-100"):
        data.cifar100()
    with pytest.raises(FileNotFoundError, match=r"CIFAR_10 is neither in"):  # not in that folder
        data.cifar10()


def test_svhn_of_files(folder, monkeypatch, publish):
    monkeypatch.setattr(colour, "SVHN_FILES", {"train_32x32.mat": 3, "test_32x32.mat": 2})
    (folder / "svhn").mkdir()
    random = np.random.default_rng(0)
    for name, n in colour.SVHN_FILES.items():
        X = random.integers(256, size=(32, 32, 3, n), dtype=np.uint8)
        y = np.array([[10], [1], [9]][:n], np.uint8)
        savemat(folder / "svhn" / name, {"X": X, "y": y})
        publish("SVHN", name, (folder / "svhn" / name).read_bytes())
    found = data.svhn()
    assert found.train_targets.tolist() == [0, 1, 9]
    blue = X[3, 4, 2, 1] / 255  # of the last file: row 3, column 4 of its second picture
    expected = (blue - data.SVHN_MEAN[2]) / data.SVHN_STD[2]
    assert found.test_inputs[1, 2, 3, 4].item() == pytest.approx(expected, rel=1e-5)
    (folder / "svhn" / "train_32x32.mat").unlink()
    with pytest.raises(FileNotFoundError, match=r"train_32x32\.mat is missing; .* X: uint8"):
        data.svhn()


@pytest.mark.parametrize("last", [False, True], ids=["planes", "colours of each pixel"])
def test_orders_of_colours_are_told_apart(last):
    y, x = np.mgrid[:32, :32]
    smooth = np.stack([4 * y, 255 - 3 * x, 100 + y + x]).astype(np.uint8)
    rows = np.tile((smooth.transpose(1, 2, 0) if last else smooth).reshape(1, -1), (5, 1))
    np.testing.assert_array_equal(colour.planes(rows)[3], smooth)


def test_area_weights_average():
    W = digit.area_weights(28, 16)
    np.testing.assert_allclose(W.sum(1), 1)
    np.testing.assert_allclose(W.sum(0), 16 / 28)  # each pixel counts alike
    np.testing.assert_array_equal(digit.area_weights(6, 3), np.kron(np.eye(3), [0.5, 0.5]))


def idx(array):
    head = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes(), 1)


@pytest.fixture
def few_digits(folder, monkeypatch, publish):
    """Three made-up pictures to train and two to test in MNIST's files; what they hold, by file."""
    shapes = {
        kind: {f: (3 if "train" in f else 2, *shape[1:]) for f, shape in files.items()}
        for kind, files in digit.IDX_FILES.items()
    }
    monkeypatch.setattr(digit, "IDX_FILES", shapes)
    (folder / "mnist").mkdir()
    pictures = {}
    for file, shape in {**shapes["images"], **shapes["labels"]}.items():
        pictures[file] = np.random.default_rng(0).integers(10, size=shape).astype(np.uint8)
        (folder / "mnist" / file).write_bytes(idx(pictures[file]))
        publish("MNIST", file, pictures[file].tobytes())
    return pictures


def test_mnist16_averages_over_areas(few_digits):
    found = data.mnist16()
    everything = torch.cat([found.train_inputs, found.test_inputs])
    assert everything.shape == (5, 256)
    first = few_digits["train-images-idx3-ubyte.gz"][0] / 255
    fine = np.kron(first, np.ones((4, 4)))  # 112 = 16 x 7
    means = fine.reshape(16, 7, 16, 7).mean((1, 3))
    np.testing.assert_allclose(everything[0].reshape(16, 16), means, rtol=1e-5)


def test_a_changed_pixel_is_noticed_and_another_compression_is_not(few_digits, folder):
    name = "train-images-idx3-ubyte.gz"
    path, pictures = folder / "mnist" / name, few_digits[name]
    before = data.mnist16().train_inputs
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()), 9))
    assert torch.equal(data.mnist16().train_inputs, before)
    pictures[1, 2, 3] ^= 1
    path.write_bytes(idx(pictures))
    with pytest.raises(ValueError, match=r"the form of the train-.* of MNIST, but not") as error:
        data.mnist16()
    assert str(error.value).startswith(str(path))
    for part in ("it was changed, or is of another data set; delete it and get it", "of your own"):
        assert part in str(error.value)


@needs_fashion
@pytest.mark.parametrize("read", [data.mnist, data.mnist16, data.fashion_mnist])
def test_mnist_and_fashion_mnist_under_each_others_names(tmp_path, monkeypatch, read):
    real = os.environ["KRONSCOPE_DATA"]
    for name, other in (("mnist", "fashion-mnist"), ("fashion-mnist", "mnist")):
        (tmp_path / name).symlink_to(os.path.join(real, other))
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path))
    other = "MNIST" if read is data.fashion_mnist else "Fashion-MNIST"
    with pytest.raises(ValueError, match=rf"it is the train-images-idx3-ubyte\.gz of {other};"):
        read()


@needs_files
def test_real_mnist():
    found = data.mnist()
    assert found.train_inputs.shape == (60000, 784)
    # the pixel means of the published files
    assert 255 * found.train_inputs.double().mean().item() == pytest.approx(33.318, abs=1e-3)
    assert 255 * found.test_inputs.double().mean().item() == pytest.approx(33.791, abs=1e-3)


@needs_files
def test_real_mnist16():
    found = data.mnist16()
    assert found.train_inputs.shape == (60000, 256)
    assert found.train_inputs.dtype == torch.float32
    assert 0 <= found.train_inputs.min() < found.train_inputs.max() < 1 + 1e-6
    assert 255 * found.train_inputs.double().mean().item() == pytest.approx(33.318, abs=1e-3)
    assert found.train_targets.bincount().tolist() == list(digit.MNIST.train)
    assert found.test_targets.bincount().tolist() == list(digit.MNIST.test)


@needs_fashion
def test_real_fashion_mnist():
    found = data.fashion_mnist_pictures()
    assert found.train_inputs.shape == (60000, 1, 28, 28)
    # the pixel means and label counts of the published files
    assert 255 * found.train_inputs.double().mean().item() == pytest.approx(72.940, abs=1e-3)
    assert 255 * found.test_inputs.double().mean().item() == pytest.approx(73.147, abs=1e-3)
    assert found.train_targets.bincount().tolist() == [6000] * 10
    rows = data.fashion_mnist()
    assert torch.equal(rows.test_inputs, found.test_inputs.flatten(1))
    assert rows.test_targets is rows.test_inputs


@needs_files
@pytest.mark.slow
def test_initial_loss_of_the_mnist_autoencoder():
    """784 ln 2 = 543.43 for logits 0; the published demo prints 543.67 at its seed 9999."""
    problem = problems.get("mnist-autoencoder")
    torch.set_default_dtype(torch.float32)  # the initialisation draws in the default dtype
    try:
        state = training.start(training.Settings(problem, "adam", epochs=1, seed=9999))
        losses = training.evaluate(state, problem)
    finally:
        torch.set_default_dtype(torch.float64)
    assert losses["train_loss"] == pytest.approx(543.67, abs=0.1)
