"""Folder of a published data set: in $KRONSCOPE_DATA, else in the cache, else fetched by pooch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import pooch
from filelock import FileLock

from . import cache
from .download import download
from .published import ARCHIVES, KINDS, PUBLISHED, SERVED, SOURCES, Source

_DOWNLOADS = ContextVar("downloads", default=True)


@contextmanager
def without_downloads() -> Iterator[None]:
    """Context in which nothing is downloaded: data sets that are not held count as missing."""
    before = _DOWNLOADS.set(False)
    try:
        yield
    finally:
        _DOWNLOADS.reset(before)


def folder(title: str) -> Path:
    """Folder with the files of a data set of `SOURCES`.

    $KRONSCOPE_DATA/<its name>, else that in the cache, whose files are fetched where one is missing
    or has another checksum.

    Raises: FileNotFoundError or ValueError naming the set, what went wrong and the remedy.
    """
    source = SOURCES[title]
    local = _local(source)
    if local is not None:
        return local
    digests = SERVED.get(title, PUBLISHED[title])
    pup, names = _registry(source, digests), [f"{source.folder}/{file}" for file in digests]
    if not all(_is_held(pup, name) for name in names):
        _fetch(title, pup, names)
    return pup.abspath / source.folder


def _local(source: Source) -> Path | None:
    """First folder in $KRONSCOPE_DATA that fits the source's patterns, None if none does.

    Raises: FileNotFoundError where $KRONSCOPE_DATA names no folder.
    """
    root = os.environ.get("KRONSCOPE_DATA")
    if not root:
        return None
    if not Path(root).is_dir():
        raise FileNotFoundError(
            f"KRONSCOPE_DATA is {root!r}, which is no folder; expected one with a folder for each "
            f"set, as {source.folder}; set it to another, or unset it"
        )
    patterns = source.folder, *source.others
    found = (each for pattern in patterns for each in sorted(Path(root).glob(pattern)))
    return next((each for each in found if each.is_dir()), None)


def _registry(source: Source, digests: dict[str, str]) -> pooch.Pooch:
    """Checksums and addresses of the source's files, and of the archive that holds them."""
    files = {name: (digest, source.url.format(name)) for name, digest in digests.items()}
    address = source.url.partition("#")[0]
    if archive := ARCHIVES.get(Path(address).name):
        files[Path(address).name] = archive, address
    return pooch.create(
        cache.folder(),
        base_url="",
        registry={f"{source.folder}/{f}": f"{KINDS[len(d)]}:{d}" for f, (d, _) in files.items()},
        urls={f"{source.folder}/{f}": url for f, (_, url) in files.items()},
    )


def _is_held(pup: pooch.Pooch, name: str) -> bool:
    """Whether the cache has this file with the registry's checksum."""
    kind, _, digest = pup.registry[name].partition(":")
    path = pup.abspath / name
    return path.is_file() and pooch.file_hash(path, alg=kind) == digest


def _fetch(title: str, pup: pooch.Pooch, names: list[str]) -> None:
    """Fetch the files into the cache, each whole or not at all, one process after the other.

    Raises: as `folder`; where the cache cannot be written, before the download begins.
    """
    place = pup.abspath / SOURCES[title].folder
    files = f"{SOURCES[title].folder}/{SOURCES[title].shown}"
    if not _DOWNLOADS.get():
        raise _missing(title, files, f"in {place}, and nothing is fetched now")
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / ".lock"):
            for name in names:
                pup.fetch(name, downloader=download)
    except OSError as error:
        if error.errno:  # of the file system: those of connections have none
            raise ValueError(
                f"{title} could not be kept in {place} ({error}); set KRONSCOPE_CACHE to a folder "
                "that can be written and has room"
            ) from error
        raise _missing(title, files, f"in {place} nor could it be fetched ({error})") from error
    except ValueError as error:
        raise ValueError(
            f"{title} was fetched but is not what was expected ({error}); run again, or set "
            f"KRONSCOPE_DATA to a folder with {files}"
        ) from error


def _missing(title: str, files: str, otherwise: str) -> FileNotFoundError:
    """The error for a data set that is neither in `files` of $KRONSCOPE_DATA nor `otherwise`."""
    return FileNotFoundError(
        f"{title} is neither in $KRONSCOPE_DATA/{files} (KRONSCOPE_DATA is "
        f"{os.environ.get('KRONSCOPE_DATA')!r}) nor {otherwise}; set KRONSCOPE_DATA to a folder "
        f"with {files} or go online and run again"
    )
