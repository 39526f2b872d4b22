"""Data sets, read from $KRONSCOPE_DATA or the cache, or downloaded with checksums.

Also generated ones: CURVES by its recipe, FACES out of Olivetti's faces, synthetic pictures for
tests that need no file.
"""

from .augmentation import crop_and_flip
from .colour import (
    CIFAR100_MEAN,
    CIFAR100_STD,
    CIFAR_MEAN,
    CIFAR_STD,
    SVHN_MEAN,
    SVHN_STD,
    black,
    cifar10,
    cifar10_subset,
    cifar100,
    made_up_pictures,
    svhn,
)
from .curve import curves, few_curves
from .digit import (
    digits,
    digits_classes,
    digits_sequences,
    digits_standardised,
    fashion_mnist,
    fashion_mnist_pictures,
    mnist,
    mnist16,
    mnist_sequences,
    pooled_sequences,
)
from .face import faces, olivetti
from .reader import read_cifar, read_idx, read_matlab
from .source import without_downloads
from .tensors import Data, labelled, reconstruction, standardised

__all__ = [
    "CIFAR100_MEAN",
    "CIFAR100_STD",
    "CIFAR_MEAN",
    "CIFAR_STD",
    "SVHN_MEAN",
    "SVHN_STD",
    "Data",
    "black",
    "cifar10",
    "cifar10_subset",
    "cifar100",
    "crop_and_flip",
    "curves",
    "digits",
    "digits_classes",
    "digits_sequences",
    "digits_standardised",
    "faces",
    "fashion_mnist",
    "fashion_mnist_pictures",
    "few_curves",
    "labelled",
    "made_up_pictures",
    "mnist",
    "mnist16",
    "mnist_sequences",
    "olivetti",
    "pooled_sequences",
    "read_cifar",
    "read_idx",
    "read_matlab",
    "reconstruction",
    "standardised",
    "svhn",
    "without_downloads",
]
