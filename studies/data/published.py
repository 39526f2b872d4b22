"""Published files of the data sets: addresses, checksums, and the check of what a file holds.

`PUBLISHED` has the checksums of what files hold, however it is compressed; `SERVED` and `ARCHIVES`
those of files as they are served, where they differ. Their origins: published.txt.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

Content = bytes | np.ndarray

KINDS = {32: "md5", 40: "sha1", 64: "sha256"}  # by the digest's length
REMEDY = (
    "delete it and get it again, or point $KRONSCOPE_DATA to another folder; for data of your own "
    "register a problem of your own (CONTRIBUTING.md)"
)
FETCHED_FACES = "scikit-learn's copy of Olivetti's faces"


def _tables(file: str) -> dict[str, dict[str, str]]:
    """{data set: {file: digest}} of a text file beside this one."""
    tables: dict[str, dict[str, str]] = {}
    title = ""
    for line in (files(__package__) / file).read_text(encoding="utf-8").splitlines():
        if line.startswith(" "):
            name, digest = line.split()
            tables[title][name] = digest
        elif not line.startswith("#"):
            title = line
            tables[title] = {}
    return tables


PUBLISHED = _tables("published.txt")
SERVED = _tables("served.txt") | {"Olivetti's faces": PUBLISHED[FETCHED_FACES]}
ARCHIVES = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    "cifar-100-binary.tar.gz": "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
}


@dataclass(frozen=True)
class Source:
    """Address of a data set's files, and the names of its folder.

    shown: the files, for people. url: of a file, {} its name, after # if it is in an archive.
    folder: its name in the cache. others: patterns of its name in $KRONSCOPE_DATA besides.
    """

    folder: str
    shown: str
    url: str
    others: tuple[str, ...] = ()


FASHION = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/{}"
CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-{}-binary.tar.gz#{{}}"
FACES = "https://ndownloader.figshare.com/files/5976027"
SOURCES = {
    "MNIST": Source("mnist", "*.gz", "https://ossci-datasets.s3.amazonaws.com/mnist/{}"),
    "Fashion-MNIST": Source("fashion-mnist", "*.gz", FASHION),
    "Olivetti's faces": Source("olivetti", "olivettifaces.mat", FACES, ("olivetti*",)),
    "CIFAR-10": Source("cifar10", "*.bin", CIFAR.format(10), ("cifar10[!0]*", "cifar-10-*")),
    "CIFAR-100": Source("cifar100", "*.bin", CIFAR.format(100), ("cifar100*", "cifar-100-*")),
    "SVHN": Source("svhn", "*_32x32.mat", "http://ufldl.stanford.edu/housenumbers/{}", ("svhn*",)),
}


def same(content: Content, data_set: str, file: str) -> bool:
    """Whether this is the content of the data set's published file."""
    expected = PUBLISHED[data_set][file]
    return _digest(content, KINDS[len(expected)]) == expected


def _digest(content: Content, kind: str) -> str:
    plain = content if isinstance(content, bytes) else np.ascontiguousarray(content).data
    return hashlib.new(kind, plain, usedforsecurity=False).hexdigest()


def check(path: Path, content: Content, data_set: str, file: str) -> None:
    """Compare the content of `path` with that of the data set's published file.

    Raises: ValueError naming the path, what was expected, whose content it is where that is known,
    and the remedy.
    """
    if same(content, data_set, file):
        return
    found = [_digest(content, kind) for kind in KINDS.values()]
    holds = "it was changed, or is of another data set"
    for other, own in PUBLISHED.items():
        for name in (name for name, digest in own.items() if digest in found):
            holds = f"it is the {name} of {other}"
    expected = PUBLISHED[data_set][file]
    raise ValueError(
        f"{path} has the form of the {file} of {data_set}, but not its content (its "
        f"{KINDS[len(expected)]} is not {expected}): {holds}; {REMEDY}"
    )
