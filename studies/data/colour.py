"""Coloured pictures of 32x32: CIFAR-10, a part of it, CIFAR-100, SVHN, and made-up ones."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import checksums
from .reader import read_cifar, read_matlab
from .source import data_folder, missing, openml
from .tensors import Data

Batch = tuple[np.ndarray, np.ndarray]  # pictures [n, 3, 32, 32] and labels [n]
Batches = list[Batch]

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_MEAN, CIFAR100_STD = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)
SVHN_MEAN, SVHN_STD = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)
CIFAR10_FOLDERS = "cifar10", "cifar10[!0]*", "cifar-10-*"
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
BATCH, RECORD = 10000, 1 + 3 * 32 * 32  # records of each file; bytes of each record
BATCHES = [[f"data_batch_{k}" for k in range(1, 6)], ["test_batch"]]  # to train and to test
SUBSET = dict.fromkeys([*BATCHES[0], *BATCHES[1]], 1017) | {"data_batch_1": 4000}
CIFAR100_FILES = {"train.bin": 50000, "test.bin": 10000}  # with their pictures
SVHN_FILES = {"train_32x32.mat": 73257, "test_32x32.mat": 26032}  # with their pictures
SVHN_COUNTS = (
    (4948, 13861, 10585, 8497, 7458, 6882, 5727, 5595, 5045, 4659),
    (1744, 5099, 4149, 2882, 2523, 2384, 1977, 2019, 1660, 1595),
)


def black(mean: Sequence[float], std: Sequence[float]) -> tuple[float, ...]:
    """What a black pixel is in each channel once the mean is taken off and the std divided by."""
    return tuple(-m / s for m, s in zip(mean, std, strict=True))


def _normalised(pictures: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes [n, 3, 32, 32] as float32, each channel less its mean over its deviation."""
    x = torch.from_numpy(np.ascontiguousarray(pictures)).to(torch.float32).div_(255)
    m, s = (torch.tensor(each, dtype=torch.float32)[:, None, None] for each in (mean, std))
    return x.sub_(m).div_(s)


def _classes(labels: np.ndarray) -> Tensor:
    return torch.from_numpy(labels.astype(np.int64))


def cifar10() -> Data:
    """CIFAR-10 pictures [n, 3, 32, 32], each channel less its mean over its deviation; labels [n].

    Read from the records in $KRONSCOPE_DATA/cifar10*/*.bin where that folder is, data_batch_1 to 5
    to train, test_batch to test; else from the cache, else by scikit-learn from OpenML. 50,000 and
    10,000.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    folder = data_folder(*CIFAR10_FOLDERS)
    if folder is None:
        return _joined(_fetched_batches())
    return _joined([[_batch(folder, name, BATCH, "CIFAR-10") for name in k] for k in BATCHES])


def cifar10_subset() -> Data:
    """The first 4,000 pictures of CIFAR-10's first batch and 1,017 of each other, as `cifar10`.

    8,068 to train, 1,017 to test, from the whole data set's files as from ones cut to this, whose
    names may go on: data_batch_1_first4000.bin.
    """
    folder, of = data_folder(*CIFAR10_FOLDERS), "the subset of CIFAR-10"
    if folder is not None:
        return _joined([[_batch(folder, name, SUBSET[name], of) for name in k] for k in BATCHES])
    train, test = _fetched_batches()
    batches = zip(SUBSET.values(), [*train, *test], strict=True)
    *train, last = [(x[:count], t[:count]) for count, (x, t) in batches]
    return _joined([train, [last]])


def _joined(batches: Sequence[Batches]) -> Data:
    """Those to train and those to test, each joined."""
    tensors: list[Tensor] = []
    for sets in batches:
        pictures, labels = (np.concatenate(parts) for parts in zip(*sets, strict=True))
        tensors += [_normalised(pictures, CIFAR_MEAN, CIFAR_STD), _classes(labels)]
    return Data(*tensors)


def _batch(folder: Path, name: str, count: int, of: str) -> Batch:
    """The first `count` records of a batch in `name`.bin or `name`_*.bin.

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
    checksums.check(path, path.read_bytes()[: count * RECORD], of, f"{name}.bin")
    return pictures[:count], labels[:count]


def _fetched_batches() -> list[Batches]:
    """The five batches to train and the one to test, as in the published files."""
    counts = (5000,) * 10, (1000,) * 10
    found = openml("CIFAR_10", 1, "cifar10/*.bin", 3 * 32 * 32, 50000, counts)
    pictures = found["pictures"].reshape(6, 10000, 3, 32, 32)
    batches = list(zip(pictures, found["labels"].reshape(6, 10000), strict=True))
    return [batches[:5], batches[5:]]


def cifar100() -> Data:
    """CIFAR-100 as `cifar10`, with its 100 fine labels: 50,000 to train, 10,000 to test.

    Read from $KRONSCOPE_DATA/cifar100*/train.bin and test.bin, the binary version; not fetched.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    folder = data_folder("cifar100*", "cifar-100-*")
    if folder is None:
        raise missing(
            "CIFAR-100",
            "cifar100/*.bin",
            "fetched (get https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz)",
        )
    tensors: list[Tensor] = []
    for name, count in CIFAR100_FILES.items():
        path = folder / name
        pictures, labels = read_cifar(path, classes=100, labels=2, count=count)
        checksums.check(path, path.read_bytes(), "CIFAR-100", name)
        tensors += [_normalised(pictures, CIFAR100_MEAN, CIFAR100_STD), _classes(labels)]
    return Data(*tensors)


def svhn() -> Data:
    """SVHN's house numbers cut to one digit, as `cifar10`: 73,257 to train, 26,032 to test.

    Read from $KRONSCOPE_DATA/svhn/train_32x32.mat and test_32x32.mat where that folder is, else
    from the cache, else by scikit-learn from OpenML. Labels are the digits, 0 for 0.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    folder = data_folder("svhn*")
    if folder is None:
        found = openml("SVHN", 1, "svhn/*_32x32.mat", 3 * 32 * 32, 73257, SVHN_COUNTS)
        x, t = planes(found["pictures"]), found["labels"]
        sets = [(x[:73257], t[:73257]), (x[73257:], t[73257:])]
    else:
        sets = [_svhn_file(folder / name, size) for name, size in SVHN_FILES.items()]
    tensors: list[Tensor] = []
    for pictures, labels in sets:
        tensors += [_normalised(pictures, SVHN_MEAN, SVHN_STD), _classes(labels)]
    return Data(*tensors)


def _svhn_file(path: Path, size: int) -> tuple[np.ndarray, np.ndarray]:
    """X [32, 32, 3, n], rows first, and y [n, 1], where 10 stands for 0."""
    found = read_matlab(path, {"X": (32, 32, 3, size), "y": (size, 1)})
    checksums.check(path, path.read_bytes(), "SVHN", path.name)
    return found["X"].transpose(3, 2, 0, 1), found["y"].ravel() % 10


def planes(rows: np.ndarray) -> np.ndarray:
    """Rows of 3,072 bytes as [n, 3, 32, 32], whether they hold planes or the colours of each pixel.

    Told by which of the two has the smaller differences between neighbours: pictures are smooth.
    """
    orders = rows.reshape(-1, 3, 32, 32), rows.reshape(-1, 32, 32, 3).transpose(0, 3, 1, 2)
    rough = [
        np.abs(np.diff(each[:500].astype(int), axis=a)).mean() for each in orders for a in (2, 3)
    ]
    return orders[0] if rough[0] + rough[1] <= rough[2] + rough[3] else orders[1]


def made_up_pictures(
    train: int = 400, test: int = 200, size: int = 32, classes: int = 10, channels: int = 3
) -> Data:
    """Pictures [n, channels, size, size] and labels [n], always the same; no files needed.

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
