"""Data sets: real files from $KRONSCOPE_DATA, else scikit-learn's own or its fetchers.

One set is made up, for tests that need pictures where there are no files.
"""

import gzip
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IDX_TYPES = {8: np.uint8}
MNIST_FILES: dict[str, dict[str, tuple[int, ...]]] = {  # with their shapes
    "images": {
        "train-images-idx3-ubyte.gz": (60000, 28, 28),
        "t10k-images-idx3-ubyte.gz": (10000, 28, 28),
    },
    "labels": {"train-labels-idx1-ubyte.gz": (60000,), "t10k-labels-idx1-ubyte.gz": (10000,)},
}


@dataclass(frozen=True)
class Data:
    """Inputs and targets: train [n, ...] and test [m, ...].

    Inputs are float32; targets float32 where the inputs are reconstructed, else classes, int64.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def reconstruction(train: np.ndarray, test: np.ndarray) -> Data:
    """Data whose targets are the inputs."""
    x, y = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in (train, test))
    return Data(x, x, y, y)


def pooled_sequences(pictures: np.ndarray, labels: np.ndarray, size: int, train: int) -> Data:
    """Pictures [n, h, w] read pixel by pixel, row by row, after means over size x size patches.

    Inputs are [n, (h / size) (w / size), 1], targets the labels [n]; the first `train` to train.

    Raises: ValueError where the patches do not fill the pictures.
    """
    n, h, w = pictures.shape
    if h % size or w % size:
        raise ValueError(f"patches of {size} x {size} do not fill pictures of {h} x {w}")
    means = pictures.reshape(n, h // size, size, w // size, size).mean((2, 4)).reshape(n, -1, 1)
    x = torch.from_numpy(means.astype(np.float32))
    t = torch.from_numpy(labels.astype(np.int64))
    return Data(x[:train], t[:train], x[train:], t[train:])


def digits() -> Data:
    """scikit-learn's 1,797 digits, 8x8 in [0, 1], shuffled once: 1,500 to train, 297 to test."""
    pictures, _ = _shuffled_digits()
    pixels = pictures.reshape(len(pictures), -1)
    return reconstruction(pixels[:1500], pixels[1500:])


def digits_sequences() -> Data:
    """The pictures of `digits`, pooled to 4x4 and read one by one, [n, 16, 1], with labels [n]."""
    pictures, labels = _shuffled_digits()
    return pooled_sequences(pictures, labels, size=2, train=1500)


def _shuffled_digits() -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.images[order] / 16, found.target[order]


def mnist() -> Data:
    """MNIST as rows of 784 in [0, 1]: 60,000 to train, 10,000 to test.

    Read from $KRONSCOPE_DATA/mnist/*.gz where that is set, else by scikit-learn from OpenML (kept
    in scikit-learn's own cache).

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    (pictures,) = _mnist("images")
    pixels = pictures.reshape(70000, -1)
    return reconstruction(pixels[:60000] / 255, pixels[60000:] / 255)


def mnist_sequences() -> Data:
    """MNIST pooled to 7x7 and read pixel by pixel, [n, 49, 1] in [0, 1], with labels [n].

    60,000 to train, 10,000 to test, found as those of `mnist`; errors as there.
    """
    pictures, labels = _mnist("images", "labels")
    return pooled_sequences(pictures / np.float32(255), labels, size=4, train=60000)


def _mnist(*kinds: str) -> list[np.ndarray]:
    """Of "images" [70000, 28, 28], up to 255, and "labels" [70000] those asked for."""
    root = os.environ.get("KRONSCOPE_DATA")
    if root is None:
        return _fetched_mnist(*kinds)

    def read(kind: str) -> np.ndarray:
        files = MNIST_FILES[kind].items()
        return np.concatenate(
            [read_idx(Path(root) / "mnist" / file, shape) for file, shape in files]
        )

    return [read(kind) for kind in kinds]


def _fetched_mnist(*kinds: str) -> list[np.ndarray]:
    from sklearn.datasets import fetch_openml

    try:
        found = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff")
    except OSError as error:
        raise FileNotFoundError(
            "MNIST is neither in $KRONSCOPE_DATA/mnist (not set) nor could it be fetched from "
            f"OpenML ({error}); set KRONSCOPE_DATA to a folder with mnist/*.gz or go online"
        ) from error
    arrays = {"images": found.data.reshape(-1, 28, 28), "labels": found.target.astype(np.int64)}
    return [arrays[kind] for kind in kinds]


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    Raises: FileNotFoundError or ValueError naming the file, the shape expected and what was found.
    """
    expected = f"gzipped idx file of uint8 {shape}"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a {expected}; see $KRONSCOPE_DATA")
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, ndim = struct.unpack_from(">HBB", content)
    except (OSError, EOFError, struct.error) as error:
        raise ValueError(
            f"{path} is damaged ({error}); expected a {expected}; get it again"
        ) from error
    if zeros != 0 or kind not in IDX_TYPES or ndim != len(shape):
        raise ValueError(f"{path} has header {content[:4]!r}; expected a {expected}")
    found = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    body = np.frombuffer(content, np.uint8, offset=4 + 4 * ndim)
    if found != shape or body.size != int(np.prod(shape)):
        raise ValueError(f"{path} holds {found}, {body.size} bytes; expected a {expected}")
    return body.reshape(shape)


CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
SUBSET = (8068, 1017)  # pictures to train and to test


def cifar10() -> Data:
    """CIFAR-10 pictures [n, 3, 32, 32], each channel less its mean over its deviation; labels [n].

    Read from the records in $KRONSCOPE_DATA/cifar10*/*.bin: all of data_batch_* to train, all of
    test_batch* to test.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    return _cifar(first=None, others=None)


def cifar10_subset() -> Data:
    """The first 4,000 pictures of CIFAR-10's first batch and 1,017 of each other, as `cifar10`.

    8,068 to train, 1,017 to test, from the whole data set's files as from ones cut to this.
    """
    found = _cifar(first=4000, others=1017)
    sizes = len(found.train_targets), len(found.test_targets)
    if sizes != SUBSET:
        raise ValueError(
            f"the CIFAR-10 subset has {SUBSET[0]} and {SUBSET[1]} pictures, but "
            f"{os.environ['KRONSCOPE_DATA']}/cifar10* gave {sizes[0]} and {sizes[1]}: "
            "it needs five data_batch_*.bin and test_batch*.bin"
        )
    return found


def _cifar(first: int | None, others: int | None) -> Data:
    """At most `first` records of data_batch_1 and `others` of each other file."""
    root = os.environ.get("KRONSCOPE_DATA")
    folders = sorted(Path(root).glob("cifar10*")) if root else []
    if not folders:
        raise FileNotFoundError(
            "CIFAR-10 is read from $KRONSCOPE_DATA/cifar10*/data_batch_*.bin and test_batch*.bin "
            f"(the binary version of the data set); KRONSCOPE_DATA is {root!r}"
        )

    def pictures(pattern: str) -> tuple[Tensor, Tensor]:
        files = sorted(folders[0].glob(pattern))
        if not files:
            raise FileNotFoundError(f"no {pattern} in {folders[0]}")
        limits = [first if file.name.startswith("data_batch_1") else others for file in files]
        pairs = zip(files, limits, strict=True)
        return _pictures(np.concatenate([_cifar_records(file)[:limit] for file, limit in pairs]))

    return Data(*pictures("data_batch_*.bin"), *pictures("test_batch*.bin"))


def _pictures(records: np.ndarray) -> tuple[Tensor, Tensor]:
    pixels = torch.from_numpy(records[:, 1:].reshape(-1, 3, 32, 32).astype(np.float32) / 255)
    mean, std = (torch.tensor(each)[:, None, None] for each in (CIFAR_MEAN, CIFAR_STD))
    return (pixels - mean) / std, torch.from_numpy(records[:, 0].astype(np.int64))


def _cifar_records(file: Path) -> np.ndarray:
    """[n, 3073] bytes: a label, then red, green and blue planes."""
    raw = np.fromfile(file, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % 3073:
        raise ValueError(
            f"{file} has {len(raw)} bytes, not a multiple of 3073 (a label and 3 x 32 x 32 "
            f"pixels): it is truncated or no CIFAR-10 batch; fetch it again"
        )
    records = raw.reshape(-1, 3073)
    if records[:, 0].max() > 9:
        raise ValueError(f"{file} holds the label {records[:, 0].max()}; CIFAR-10 has 0 to 9")
    return records


def made_up_pictures(train: int = 400, test: int = 200) -> Data:
    """Pictures [n, 3, 32, 32] and labels [n] in CIFAR-10's shape, always the same; no files needed.

    Each of ten classes is a coarse random pattern; a picture is its class's plus noise.
    """
    random = np.random.default_rng(0)
    patterns = random.standard_normal((10, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)

    def pictures(n: int) -> tuple[Tensor, Tensor]:
        labels = random.integers(10, size=n)
        pixels = 0.5 * patterns[labels] + random.standard_normal((n, 3, 32, 32))
        return torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(labels)

    return Data(*pictures(train), *pictures(test))
