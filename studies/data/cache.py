"""Cache of downloads and of arrays that are computed once."""

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pooch

Arrays = dict[str, np.ndarray]


def folder() -> Path:
    """Folder of the cache: $KRONSCOPE_CACHE, else "kronscope" in the platform's cache folder."""
    return Path(os.environ.get("KRONSCOPE_CACHE") or pooch.os_cache("kronscope")).expanduser()


def cached(name: str, make: Callable[[], Arrays]) -> Arrays:
    """Arrays of the cache's entry `name`.npz, computed by `make` where there is none.

    The name says all that decides the arrays: version of the recipe, seed, source. An entry is
    written whole or not at all; a damaged one (zip files have a CRC-32 of each array) is made
    again, with a warning, as is one that cannot be written.
    """
    path = folder() / f"{name}.npz"
    if path.exists():
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as entry:
                return {key: entry[key] for key in entry.files}
        except Exception as error:  # what damage makes of zip and numpy has no common type
            warnings.warn(f"{path} is damaged ({error}): it is made again", stacklevel=2)
    arrays = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as place:
            np.savez(Path(place) / path.name, **arrays)  # type: ignore[arg-type]
            (Path(place) / path.name).replace(path)
    except OSError as error:
        warnings.warn(
            f"{path} could not be written ({error}), so that it is made again each time; set "
            "KRONSCOPE_CACHE to a folder with room",
            stacklevel=2,
        )
    return arrays
