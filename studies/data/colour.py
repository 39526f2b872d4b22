"""Colour images of 32x32 pixels: CIFAR-10, a subset, CIFAR-100, SVHN, and synthetic ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import published, source
from .reader import read_cifar, read_matlab
from .tensors import Data

Batch = tuple[np.ndarray, np.ndarray]  # pictures [n, 3, 32, 32] and labels [n]

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BATCH, RECORD = 10000, 1 + 3 * 32 * 32  # records of each file; bytes of each record
BATCHES = [[f"data_batch_{k}" for k in range(1, 6)], ["test_batch"]]  # to train and to test
SUBSET = dict.fromkeys([*BATCHES[0], *BATCHES[1]], 1017) | {"data_batch_1": 4000}
CIFAR100_FILES = {"train.bin": 50000, "test.bin": 10000}  # with their pictures
SVHN_FILES = {"train_32x32.mat": 73257, "test_32x32.mat": 26032}  # with their pictures


def black(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """Value of a black pixel in each channel after normalisation: -mean / std."""
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


def _data(
    sets: Sequence[Sequence[np.ndarray]], mean: Sequence[float], std: Sequence[float]
) -> Data:
    """Normalise bytes [n, 3, 32, 32] to train and to test, (x / 255 - mean) / std in float32."""
    tensors: list[Tensor] = []
    m, s = (torch.tensor(each, dtype=torch.float32)[:, None, None] for each in (mean, std))
    for pictures, labels in sets:
        x = torch.from_numpy(np.ascontiguousarray(pictures)).to(torch.float32).div_(255)
        tensors += [x.sub_(m).div_(s), torch.from_numpy(labels.astype(np.int64))]
    return Data(*tensors)


def cifar10() -> Data:
    """CIFAR-10 as normalised pictures [n, 3, 32, 32] with labels [n]: 50,000 and 10,000.

    Each channel is less its mean over its deviation. Read from $KRONSCOPE_DATA/cifar10*/*.bin, the
    binary version, where that folder is; else from the cache, else fetched.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    return _joined(source.folder("CIFAR-10"), "CIFAR-10", dict.fromkeys(SUBSET, BATCH))


def cifar10_subset() -> Data:
    """The first 4,000 pictures of CIFAR-10's first batch and 1,017 of each other, as `cifar10`.

    8,068 to train, 1,017 to test, from the whole data set's files as from ones cut to this, whose
    names may go on: data_batch_1_first4000.bin.
    """
    return _joined(source.folder("CIFAR-10"), "the subset of CIFAR-10", SUBSET)


def _joined(folder: Path, of: str, counts: dict[str, int]) -> Data:
    """Join the first records of the batches to train, and of those to test, by their counts."""
    sets = [[_batch(folder, name, counts[name], of) for name in names] for names in BATCHES]
    joined = [[np.concatenate(each) for each in zip(*batches, strict=True)] for batches in sets]
    return _data(joined, CIFAR_MEAN, CIFAR_STD)


def _batch(folder: Path, name: str, count: int, of: str) -> Batch:
    """Read the first `count` records of a CIFAR-10 batch in `name`.bin or `name`_*.bin.

    Raises: as `read_cifar`, where the file has another length, and for other content.
    """
    path = folder / f"{name}.bin"
    if not path.is_file():
        path = next(iter(sorted(folder.glob(f"{name}_*.bin"))), path)
    expected = f"{count:,} records of CIFAR-10 in the binary version, {count * RECORD:,} bytes"
    remedy = f"get {CIFAR10_URL} and put its *.bin there"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected {expected} or more; {remedy}")
    size = path.stat().st_size
    if size % RECORD or not count <= size // RECORD <= BATCH:
        more = "" if count == BATCH else f" or more, up to {BATCH:,} records"
        other = " (cut files: problem cifar10-subset-cnn)" if count == BATCH else ""
        raise ValueError(f"{path} has {size:,} bytes; expected {expected}{more}; {remedy}{other}")
    pictures, labels = read_cifar(path, classes=10)
    published.check(path, path.read_bytes()[: count * RECORD], of, f"{name}.bin")
    return pictures[:count], labels[:count]


def cifar100() -> Data:
    """CIFAR-100 as `cifar10`, with its 100 fine labels: 50,000 to train, 10,000 to test.

    Found as `cifar10`, in $KRONSCOPE_DATA/cifar100*/train.bin and test.bin; errors as there.
    """
    folder, sets = source.folder("CIFAR-100"), []
    for name, count in CIFAR100_FILES.items():
        path = folder / name
        sets += [read_cifar(path, classes=100, labels=2, count=count)]
        published.check(path, path.read_bytes(), "CIFAR-100", name)
    return _data(sets, CIFAR100_MEAN, CIFAR100_STD)


def svhn() -> Data:
    """SVHN, house numbers cut to one digit, as `cifar10`: 73,257 to train, 26,032 to test.

    Found as `cifar10`, in $KRONSCOPE_DATA/svhn*/*_32x32.mat; errors as there. Labels are the
    digits, 0 for 0.
    """
    folder, sets = source.folder("SVHN"), []
    for name, count in SVHN_FILES.items():  # X [32, 32, 3, n], rows first; y [n, 1], 10 for 0
        path = folder / name
        found = read_matlab(path, {"X": (32, 32, 3, count), "y": (count, 1)})
        published.check(path, path.read_bytes(), "SVHN", name)
        sets += [(found["X"].transpose(3, 2, 0, 1), found["y"].ravel() % 10)]
    return _data(sets, SVHN_MEAN, SVHN_STD)


def made_up_pictures(
    train: int = 400, test: int = 200, size: int = 32, classes: int = 10, channels: int = 3
) -> Data:
    """Synthetic labelled pictures [n, channels, size, size], always the same, made without files.

    Each class is a coarse random pattern of 4x4; a picture is its class's plus noise.

    Raises: ValueError where the size is not a multiple of 4.
    """
    if size % 4:
        raise ValueError(f"patterns of 4 x 4 do not fill pictures of {size} x {size}")
    random, side = np.random.default_rng(0), size // 4
    patterns = random.standard_normal((classes, channels, 4, 4))
    patterns = patterns.repeat(side, axis=2).repeat(side, axis=3)

    def pictures(n: int) -> tuple[Tensor, Tensor]:
        labels = random.integers(classes, size=n)
        pixels = 0.5 * patterns[labels] + random.standard_normal((n, channels, size, size))
        return torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(labels)

    return Data(*pictures(train), *pictures(test))
