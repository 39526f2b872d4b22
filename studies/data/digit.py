"""Grey pictures of 28x28 and less: digits, MNIST and Fashion-MNIST."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import checksums
from .reader import read_idx
from .source import data_folder, openml
from .tensors import Data, labelled, reconstruction, standardised

IDX_FILES: dict[str, dict[str, tuple[int, ...]]] = {  # with their shapes
    "images": {
        "train-images-idx3-ubyte.gz": (60000, 28, 28),
        "t10k-images-idx3-ubyte.gz": (10000, 28, 28),
    },
    "labels": {"train-labels-idx1-ubyte.gz": (60000,), "t10k-labels-idx1-ubyte.gz": (10000,)},
}


@dataclass(frozen=True)
class Published:
    """A set in MNIST's files: its title, folder and name at OpenML, its counts of each label."""

    title: str
    folder: str
    name: str
    train: tuple[int, ...]
    test: tuple[int, ...]


MNIST = Published(
    "MNIST",
    "mnist",
    "mnist_784",
    (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949),
    (980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009),
)
FASHION = Published("Fashion-MNIST", "fashion-mnist", "Fashion-MNIST", (6000,) * 10, (1000,) * 10)


def pooled_sequences(pictures: np.ndarray, labels: np.ndarray, size: int, train: int) -> Data:
    """Pictures [n, h, w] read pixel by pixel, row by row, after means over size x size patches.

    Inputs are [n, (h / size) (w / size), 1], targets the labels [n]; the first `train` to train.

    Raises: ValueError where the patches do not fill the pictures.
    """
    n, h, w = pictures.shape
    if h % size or w % size:
        raise ValueError(f"patches of {size} x {size} do not fill pictures of {h} x {w}")
    means = pictures.reshape(n, h // size, size, w // size, size).mean((2, 4)).reshape(n, -1, 1)
    return labelled(means, labels, train)


def area_weights(size: int, smaller: int) -> np.ndarray:
    """[smaller, size]: row i holds the shares of the pixels that lie in the i-th larger pixel.

    As W X Wᵀ it averages a picture over areas, whatever the sizes.

        >>> area_weights(3, 2).round(3).tolist()
        [[0.667, 0.333, 0.0], [0.0, 0.333, 0.667]]
    """
    edges = np.linspace(0, size, smaller + 1)
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return overlap.clip(min=0) * smaller / size


def digits() -> Data:
    """scikit-learn's 1,797 digits, 8x8 in [0, 1], shuffled once: 1,500 to train, 297 to test."""
    pictures, _ = _shuffled_digits()
    pixels = pictures.reshape(len(pictures), -1)
    return reconstruction(pixels[:1500], pixels[1500:])


def digits_classes() -> Data:
    """The pictures of `digits` as rows of 64, with labels [n]."""
    pictures, labels = _shuffled_digits()
    return labelled(pictures.reshape(len(pictures), -1), labels, train=1500)


def digits_standardised() -> Data:
    """The pictures of `digits`, less their mean and divided by one number, as those of `faces`."""
    pictures, _ = _shuffled_digits()
    pixels = pictures.reshape(len(pictures), -1)
    return standardised(pixels[:1500], pixels[1500:])


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

    Read from $KRONSCOPE_DATA/mnist/*.gz where that folder is, else from the cache, else by
    scikit-learn from OpenML.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    return _rows(MNIST)


def mnist16() -> Data:
    """MNIST averaged over areas to 16x16, rows of 256 in [0, 1], with labels; else as `mnist`."""
    pictures, labels = _published(MNIST, "images", "labels")
    W = area_weights(28, 16).astype(np.float32)
    small = W @ (pictures / np.float32(255)) @ W.T
    return labelled(small.reshape(-1, 256), labels, train=60000)


def mnist_sequences() -> Data:
    """MNIST pooled to 7x7 and read pixel by pixel, [n, 49, 1] in [0, 1], with labels [n].

    60,000 to train, 10,000 to test, found as those of `mnist`; errors as there.
    """
    pictures, labels = _published(MNIST, "images", "labels")
    return pooled_sequences(pictures / np.float32(255), labels, size=4, train=60000)


def fashion_mnist() -> Data:
    """Fashion-MNIST as rows of 784 in [0, 1]: 60,000 to train, 10,000 to test.

    Found as `mnist`, in $KRONSCOPE_DATA/fashion-mnist/*.gz; errors as there.
    """
    return _rows(FASHION)


def fashion_mnist_pictures() -> Data:
    """The pictures of `fashion_mnist`, [n, 1, 28, 28] in [0, 1], with labels [n]."""
    pictures, labels = _published(FASHION, "images", "labels")
    return labelled(pictures[:, None] / np.float32(255), labels, train=60000)


def _rows(published: Published) -> Data:
    (pictures,) = _published(published, "images")
    pixels = pictures.reshape(70000, -1) / np.float32(255)
    return reconstruction(pixels[:60000], pixels[60000:])


def _published(published: Published, *kinds: str) -> list[np.ndarray]:
    """Of "images" [70000, 28, 28], up to 255, and "labels" [70000] those asked for."""
    folder = data_folder(published.folder)
    if folder is not None:
        return [
            np.concatenate([_file(folder, published, *file) for file in IDX_FILES[kind].items()])
            for kind in kinds
        ]
    counts = published.train, published.test
    found = openml(published.name, 1, f"{published.folder}/*.gz", 784, 60000, counts)
    arrays = {"images": found["pictures"].reshape(-1, 28, 28), "labels": found["labels"]}
    return [arrays[kind] for kind in kinds]


def _file(folder: Path, published: Published, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """What the published file of this name holds. Raises: as `read_idx`, and for other content."""
    found = read_idx(folder / name, shape)
    checksums.check(folder / name, found, published.title, name)
    return found
