"""Where a set comes from: $KRONSCOPE_DATA, then the cache, then scikit-learn's fetchers."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from errno import EDQUOT, ENOSPC
from http.client import HTTPException
from pathlib import Path

import numpy as np

from . import cache
from .download import downloads

FULL = ENOSPC, EDQUOT  # what the system says of a disk that is
_DOWNLOADS = ContextVar("downloads", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Inside, a set that lies neither in $KRONSCOPE_DATA nor in the cache is missing."""
    before = _DOWNLOADS.set(False)
    try:
        yield
    finally:
        _DOWNLOADS.reset(before)


def data_folder(*patterns: str) -> Path | None:
    """The first folder in $KRONSCOPE_DATA whose name fits a pattern, None where there is none.

    Raises: FileNotFoundError where $KRONSCOPE_DATA names no folder.
    """
    root = os.environ.get("KRONSCOPE_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"KRONSCOPE_DATA is {root!r}, which is no folder; expected one with a folder for each "
            f"set, as {patterns[0]}; set it to another, or unset it"
        )
    found = (f for pattern in patterns for f in sorted(Path(root).glob(pattern)) if f.is_dir())
    return next(found, None)


def missing(what: str, files: str, otherwise: str) -> FileNotFoundError:
    """The error for a set that is nowhere: in `files` of $KRONSCOPE_DATA, nor `otherwise`."""
    return FileNotFoundError(
        f"{what} is neither in $KRONSCOPE_DATA/{files} (KRONSCOPE_DATA is "
        f"{os.environ.get('KRONSCOPE_DATA')!r}) nor {otherwise}; set KRONSCOPE_DATA to a folder "
        f"with {files} or go online and run again"
    )


def openml(
    name: str, version: int, files: str, features: int, train: int, counts: Sequence[Sequence[int]]
) -> cache.Arrays:
    """A set of OpenML, from the cache or fetched: "pictures" [n, features] and "labels" [n].

    counts: of each label in the first `train` examples and in the others, as published; that a
    set has them tells that its order is the published one. Of labels the last digit is kept: SVHN
    writes 10 for 0.

    Raises: FileNotFoundError where it cannot be fetched; ValueError for other content.
    """
    return cache.cached(
        f"openml-{name}-{version}",
        lambda: _openml(name, version, files, features, train, counts),
    )


def _openml(
    name: str, version: int, files: str, features: int, train: int, counts: Sequence[Sequence[int]]
) -> cache.Arrays:
    from sklearn.datasets import fetch_openml

    def fetch() -> cache.Arrays:
        # scikit-learn 1.9's other parser fails on labels of digits under pandas 3.1 (its #34902)
        found = fetch_openml(name, version=version, as_frame=False, parser="liac-arff")
        pictures = np.asarray(found.data).astype(np.uint8)
        return {"pictures": pictures, "labels": np.asarray(found.target).astype(np.int64) % 10}

    arrays = fetched(name, files, fetch)
    shape, labels = arrays["pictures"].shape, arrays["labels"]
    wanted = sum(counts[0]) + sum(counts[1]), features
    sets = [np.bincount(part, minlength=10).tolist() for part in (labels[:train], labels[train:])]
    if shape != wanted or sets != [list(each) for each in counts]:
        raise ValueError(
            f"OpenML's {name}, version {version}, has pictures {shape} and {sets} of each label to "
            f"train and to test; expected {wanted} and {[list(each) for each in counts]}: it is "
            f"not in the published order; set KRONSCOPE_DATA to a folder with {files}"
        )
    return arrays


def fetched(name: str, files: str, fetch: Callable[[], cache.Arrays]) -> cache.Arrays:
    """What a fetcher of scikit-learn gives; it checks checksums and replaces damaged files.

    Before anything is downloaded the folders that it will be kept in are found to be writable.

    Raises: FileNotFoundError or ValueError naming the set, what went wrong and the remedy.
    """
    place = cache.folder()
    if not _DOWNLOADS.get():
        raise missing(name, files, f"in {place}, and nothing is fetched now")
    cache.require_writable(place, "KRONSCOPE_CACHE")
    theirs = Path(os.environ.get("SCIKIT_LEARN_DATA", "~/scikit_learn_data"))  # as it does
    cache.require_writable(theirs.expanduser(), "SCIKIT_LEARN_DATA")
    try:
        with downloads(name, place / "parts"):
            return fetch()
    except (OSError, HTTPException) as error:
        if getattr(error, "errno", None) in FULL:
            raise ValueError(
                f"{name} could not be kept ({error}); set KRONSCOPE_CACHE and SCIKIT_LEARN_DATA "
                f"(now {place} and {theirs}) to folders with room"
            ) from error
        raise missing(name, files, f"in {place} nor could it be fetched ({error})") from error
    except ValueError as error:
        raise ValueError(
            f"{name} was fetched but is not what was expected ({error}); run again, or set "
            f"KRONSCOPE_DATA to a folder with {files}"
        ) from error
