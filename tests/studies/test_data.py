"""Data files: real ones where they are, and clear errors where they are not."""

import gzip
import os
import struct

import numpy as np
import pytest
import sklearn.datasets
import torch

from studies import data, problems, training

needs_files = pytest.mark.skipif(
    "KRONSCOPE_DATA" not in os.environ, reason="$KRONSCOPE_DATA is not set: no real MNIST files"
)


def idx(array, kind=8):
    head = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


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


def test_read_idx(tmp_path):
    array = np.arange(12).reshape(3, 2, 2)
    path = tmp_path / "images.gz"
    path.write_bytes(idx(array))
    np.testing.assert_array_equal(data.read_idx(path, (3, 2, 2)), array)


BAD_FILES = {  # what the file holds (None: there is none), and what the error says of it
    "missing": (None, "is missing; expected a gzipped idx file"),
    "no gzip": (b"no gzip at all", "is damaged"),
    "cut short": (idx(np.zeros((3, 2, 2)))[:20], "is damaged"),
    "no header": (gzip.compress(b"ab"), "is damaged"),
    "other kind": (idx(np.zeros((3, 2, 2)), kind=13), "has header"),
    "other shape": (idx(np.zeros((4, 2, 2))), r"holds \(4, 2, 2\)"),
    "a byte less": (
        gzip.compress(gzip.decompress(idx(np.zeros((3, 2, 2))))[:-1]),
        r"holds .* 11 bytes",
    ),
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_what_was_expected(tmp_path, content, message):
    path = tmp_path / "images.gz"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.read_idx(path, (3, 2, 2))
    assert str(path) in str(error.value)
    assert "(3, 2, 2)" in str(error.value)


def test_mnist_from_files_of_the_folder(tmp_path, monkeypatch):
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("KRONSCOPE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz is missing"):
        data.mnist()


def test_mnist_is_fetched_where_no_folder_is_named(monkeypatch):
    """The fetcher is scikit-learn's; here it answers as it does offline, then as it does online."""
    monkeypatch.delenv("KRONSCOPE_DATA", raising=False)

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", offline)
    with pytest.raises(FileNotFoundError, match="set KRONSCOPE_DATA to a folder"):
        data.mnist()

    class Bunch:
        data = np.full((70000, 784), 255.0)
        target = np.full(70000, "5")

    asked = {}
    monkeypatch.setattr(
        sklearn.datasets, "fetch_openml", lambda name, **k: asked.update(name=name, **k) or Bunch
    )
    found = data.mnist()
    assert asked["name"] == "mnist_784"
    assert found.train_inputs.shape == (60000, 784)
    assert found.test_inputs.shape == (10000, 784)
    assert found.test_inputs.max() == 1


@needs_files
def test_real_mnist():
    found = data.mnist()
    assert found.train_inputs.shape == (60000, 784)
    # the pixel means of the published files
    assert 255 * found.train_inputs.double().mean().item() == pytest.approx(33.318, abs=1e-3)
    assert 255 * found.test_inputs.double().mean().item() == pytest.approx(33.791, abs=1e-3)


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
