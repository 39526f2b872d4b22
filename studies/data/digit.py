"""Grey images of up to 28x28 pixels: scikit-learn's digits, MNIST and Fashion-MNIST."""

from pathlib import Path

import numpy as np

from . import published, source
from .reader import read_idx
from .tensors import Data, labelled, reconstruction, standardised

TRAIN = 60000  # pictures of MNIST and Fashion-MNIST
IDX_FILES: dict[str, dict[str, tuple[int, ...]]] = {  # with their shapes
    "images": {
        "train-images-idx3-ubyte.gz": (60000, 28, 28),
        "t10k-images-idx3-ubyte.gz": (10000, 28, 28),
    },
    "labels": {"train-labels-idx1-ubyte.gz": (60000,), "t10k-labels-idx1-ubyte.gz": (10000,)},
}


def pooled_sequences(pictures: np.ndarray, labels: np.ndarray, size: int, train: int) -> Data:
    """Sequences of the pixels, row by row, of pictures [n, h, w] pooled over size x size patches.

    Inputs are [n, (h / size) (w / size), 1], targets the labels [n]; the first `train` to train.

    Raises: ValueError where the patches do not fill the pictures.
    """
    n, h, w = pictures.shape
    if h % size or w % size:
        raise ValueError(f"patches of {size} x {size} do not fill pictures of {h} x {w}")
    means = pictures.reshape(n, h // size, size, w // size, size).mean((2, 4)).reshape(n, -1, 1)
    return labelled(means, labels, train)


def area_weights(size: int, smaller: int) -> np.ndarray:
    """Matrix W [smaller, size] of area averaging: shares of each pixel in the larger pixels.

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
    rows = _digit_rows()[0]
    return reconstruction(rows[:1500], rows[1500:])


def digits_classes() -> Data:
    """The pictures of `digits` as rows of 64, with labels [n]."""
    return labelled(*_digit_rows(), train=1500)


def digits_standardised() -> Data:
    """The pictures of `digits`, standardised as those of `faces`."""
    rows = _digit_rows()[0]
    return standardised(rows[:1500], rows[1500:])


def digits_sequences() -> Data:
    """The pictures of `digits`, pooled to 4x4 and read one by one, [n, 16, 1], with labels [n]."""
    rows, labels = _digit_rows()
    return pooled_sequences(rows.reshape(-1, 8, 8), labels, size=2, train=1500)


def _digit_rows() -> tuple[np.ndarray, np.ndarray]:
    """Rows of 64 in [0, 1] and labels, shuffled."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.data[order] / 16, found.target[order]


def mnist() -> Data:
    """MNIST as rows of 784 in [0, 1]: 60,000 to train, 10,000 to test.

    Read from $KRONSCOPE_DATA/mnist/*.gz where that folder is, else from the cache, else fetched.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    return _rows("MNIST")


def mnist16() -> Data:
    """MNIST averaged over areas to 16x16, rows of 256 in [0, 1], with labels; else as `mnist`."""
    pictures, labels = _arrays("MNIST", "images", "labels")
    W = area_weights(28, 16).astype(np.float32)
    small = W @ (pictures / np.float32(255)) @ W.T
    return labelled(small.reshape(-1, 256), labels, train=TRAIN)


def mnist_sequences() -> Data:
    """MNIST pooled to 7x7 and read pixel by pixel, [n, 49, 1] in [0, 1], with labels [n].

    60,000 to train, 10,000 to test, found as those of `mnist`; errors as there.
    """
    pictures, labels = _arrays("MNIST", "images", "labels")
    return pooled_sequences(pictures / np.float32(255), labels, size=4, train=TRAIN)


def fashion_mnist() -> Data:
    """Fashion-MNIST as rows of 784 in [0, 1]: 60,000 to train, 10,000 to test.

    Found as `mnist`, in $KRONSCOPE_DATA/fashion-mnist/*.gz; errors as there.
    """
    return _rows("Fashion-MNIST")


def fashion_mnist_pictures() -> Data:
    """Fashion-MNIST as pictures [n, 1, 28, 28] in [0, 1], with labels [n]; else `fashion_mnist`."""
    pictures, labels = _arrays("Fashion-MNIST", "images", "labels")
    return labelled(pictures[:, None] / np.float32(255), labels, train=TRAIN)


def _rows(title: str) -> Data:
    (pictures,) = _arrays(title, "images")
    pixels = pictures.reshape(len(pictures), -1) / np.float32(255)
    return reconstruction(pixels[:TRAIN], pixels[TRAIN:])


def _arrays(title: str, *kinds: str) -> list[np.ndarray]:
    """Of "images" [70000, 28, 28], up to 255, and "labels" [70000] those asked for."""
    folder = source.folder(title)
    return [
        np.concatenate([_file(folder, title, *file) for file in IDX_FILES[kind].items()])
        for kind in kinds
    ]


def _file(folder: Path, title: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Read a published idx file. Raises: as `read_idx`, and ValueError for other content."""
    found = read_idx(folder / name, shape)
    published.check(folder / name, found, title, name)
    return found
