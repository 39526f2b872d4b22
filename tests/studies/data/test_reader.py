"""Readers: what is right is read; what is not gives file, expectation, finding and remedy."""

import gzip
import struct

import numpy as np
import pytest
from scipy.io import savemat

from kronscope.studies import data

ARRAY = np.arange(12).reshape(3, 2, 2)


def idx(array, kind=8):
    head = struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape)
    return gzip.compress(head + array.astype(np.uint8).tobytes())


def matlab(folder, **arrays):
    path = folder / "made.mat"
    savemat(path, arrays, do_compression=True)
    content = path.read_bytes()
    path.unlink()
    return content


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def test_read_idx(tmp_path):
    path = tmp_path / "images.gz"
    path.write_bytes(idx(ARRAY))
    np.testing.assert_array_equal(data.read_idx(path, (3, 2, 2)), ARRAY)


IDX = {  # what the file holds (None: there is none), and what the error says of it
    "missing": (None, "is missing; expected a gzipped idx file"),
    "empty": (b"", "is damaged"),
    "no gzip": (b"no gzip at all", "is damaged"),
    "cut short": (idx(ARRAY)[:20], "is damaged"),
    "a wrong bit": (flipped(idx(ARRAY), -5), "is damaged"),
    "a wrong bit inside": (flipped(idx(ARRAY), 12), "is damaged"),
    "no header": (gzip.compress(b"ab"), "is damaged"),
    "no sizes": (gzip.compress(gzip.decompress(idx(ARRAY))[:10]), "is damaged"),
    "other kind": (idx(ARRAY, kind=13), "has header"),
    "other dimension": (idx(ARRAY[0]), "has header"),
    "other shape": (idx(np.zeros((4, 2, 2))), r"holds \(4, 2, 2\)"),
    "a byte less": (gzip.compress(gzip.decompress(idx(ARRAY))[:-1]), r"holds .* 11 bytes"),
    "a byte more": (gzip.compress(gzip.decompress(idx(ARRAY)) + b"0"), r"holds .* 13 bytes"),
}


@pytest.mark.parametrize(("content", "message"), IDX.values(), ids=IDX)
def test_a_bad_idx_file_is_named_with_what_was_expected(tmp_path, content, message):
    path = written(tmp_path / "images.gz", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.read_idx(path, (3, 2, 2))
    says(error, path, "(3, 2, 2)")


def record(*labels):
    return np.array(labels, np.uint8).tobytes() + np.arange(3072).astype(np.uint8).tobytes()


@pytest.mark.parametrize(("classes", "labels"), [(10, [7]), (100, [3, 77])])
def test_read_cifar(tmp_path, classes, labels):
    path = written(tmp_path / "batch.bin", record(*labels) * 2)
    pictures, found = data.read_cifar(path, classes, len(labels))
    assert pictures.shape == (2, 3, 32, 32)
    assert found.tolist() == [labels[-1]] * 2
    np.testing.assert_array_equal(pictures[1].ravel(), np.arange(3072).astype(np.uint8))


def test_a_cifar_file_of_another_length_is_named(tmp_path):
    path = written(tmp_path / "batch.bin", record(1, 77) * 2)
    with pytest.raises(ValueError, match="holds 2 records, not 3; expected a") as error:
        data.read_cifar(path, classes=100, labels=2, count=3)
    says(error, path, "CIFAR-100 batch in the binary version")


CIFAR = {
    "missing": (None, "is missing; expected a CIFAR-10 batch"),
    "empty": (b"", "has 0 bytes, not a multiple of 3073"),
    "cut short": (record(1)[:-1], "has 3072 bytes, not a multiple of 3073"),
    "records of CIFAR-100": (record(1, 2) * 2, "has 6148 bytes, not a multiple of 3073"),
    "no such class": (record(1) + record(200), "holds the label 200; CIFAR-10 has 0 to 9"),
}


@pytest.mark.parametrize(("content", "message"), CIFAR.values(), ids=CIFAR)
def test_a_bad_cifar_file_is_named_with_what_was_expected(tmp_path, content, message):
    path = written(tmp_path / "batch.bin", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.read_cifar(path, classes=10)
    says(error, path, "CIFAR-10 batch in the binary version")


GOOD = np.arange(24, dtype=np.uint8).reshape(4, 6)


def test_read_matlab(tmp_path):
    path = written(tmp_path / "made.mat", matlab(tmp_path, X=GOOD, other=GOOD))
    found = data.read_matlab(path, {"X": (4, 6)})
    assert list(found) == ["X"]
    np.testing.assert_array_equal(found["X"], GOOD)


MATLAB = {  # what is made of a good file's bytes, or the variables of another
    "missing": (None, "is missing; expected a MATLAB file"),
    "empty": (lambda _: b"", "is damaged"),
    "no MATLAB file": (lambda _: b"nothing of that kind" * 20, "is damaged"),
    "cut short": (lambda content: content[:-10], "is damaged"),
    "cut in the header": (lambda content: content[:50], "is damaged"),
    "a wrong bit": (lambda content: flipped(content, -3), "is damaged"),
    "other variable": ({"Y": GOOD}, "has no variable X"),
    "other shape": ({"X": GOOD.T}, r"holds X: uint8 \(6, 4\)"),
    "other dimension": ({"X": GOOD[None]}, r"holds X: uint8 \(1, 4, 6\)"),
    "other numbers": ({"X": GOOD.astype(float)}, "holds X: float64"),
}


@pytest.mark.parametrize(("change", "message"), MATLAB.values(), ids=MATLAB)
def test_a_bad_matlab_file_is_named_with_what_was_expected(tmp_path, change, message):
    content = matlab(tmp_path, **change) if isinstance(change, dict) else None
    if callable(change):
        content = change(matlab(tmp_path, X=GOOD))
    path = written(tmp_path / "made.mat", content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        data.read_matlab(path, {"X": (4, 6)})
    says(error, path, "X: uint8 (4, 6)")


def written(path, content):
    if content is not None:
        path.write_bytes(content)
    return path


def says(error, path, expected):
    """File, expectation and remedy."""
    assert str(path) in str(error.value)
    assert expected in str(error.value)
    assert "get it again, or point $KRONSCOPE_DATA to" in str(error.value)
