"""Arrays that are generated, derived or fetched once, kept with their checksums."""

import hashlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


def folder() -> Path:
    """$KRONSCOPE_CACHE, else "kronscope" in the platform's folder for caches."""
    if named := os.environ.get("KRONSCOPE_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser() / "kronscope"
    usual = "~/Library/Caches" if sys.platform == "darwin" else "~/.cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or usual).expanduser() / "kronscope"


def require_writable(place: Path, variable: str) -> None:
    """Nothing where files can be written to this folder, which is made if need be.

    Raises: ValueError naming the folder, why it cannot be written, and what names another one.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise ValueError(
            f"the folder {place}, in which downloads are kept, cannot be written ({error}); set "
            f"{variable} to one that can"
        ) from error


def cached(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays that `make` gives, from the cache's entry of this name where there is one.

    The name says all that decides the arrays: version of the recipe, seed, source. An entry is
    `name.npz` beside `name.npz.sha256`, each written whole or not at all; one that does not fit
    its checksum is made again, with a warning, as is one that cannot be written.
    """
    path = folder() / f"{name}.npz"
    if path.exists():
        found = _read(path)
        if found is not None:
            return found
        warnings.warn(f"{path} does not fit its checksum: it is made again", stacklevel=2)
    arrays = make()
    try:
        _write(path, arrays)
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error}), so that it is made again each time; set "
            "KRONSCOPE_CACHE to a folder with room",
            stacklevel=2,
        )
    return arrays


def _checksum_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _read(path: Path) -> Arrays | None:
    """The entry's arrays, or None if it is damaged."""
    try:
        expected = _checksum_file(path).read_text().strip()
        if _digest(path) != expected:
            return None
    except (OSError, UnicodeDecodeError):
        return None
    with np.load(path, allow_pickle=False) as entry:
        return {key: entry[key] for key in entry.files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(path: Path, arrays: Arrays) -> None:
    """Write entry and checksum; the same arrays give the same bytes, whoever is faster."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as place:
        whole = Path(place) / path.name
        np.savez(whole, **arrays)  # type: ignore[arg-type]
        checksum = _checksum_file(whole)
        checksum.write_text(_digest(whole) + "\n")
        checksum.replace(_checksum_file(path))
        whole.replace(path)
