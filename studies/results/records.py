"""Records: one flat row per measured number, kept as Parquet parts under results/<run>/.

A run is a folder:

    results/<run>/header.json            versions, device, configuration, status
    results/<run>/records/part-*.parquet rows with the columns of COLUMNS
    results/<run>/matrices/*.npz         matrices for the block inspector
    results/<run>/figures/*.png, report.html

Every file is written under a temporary name and then moved into place, so a killed run leaves
whole files only, and what it had already measured stays readable.
"""

import io
import json
import math
import os
import secrets
import tempfile
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd

COLUMNS: dict[str, str] = {
    "run": "str",
    "study": "str",
    "problem": "str",
    "optimizer": "str",
    "seed": "int64",
    "step": "int64",
    "epoch": "float64",
    "block": "str",  # "" for a number about the whole model, such as the training loss
    "size": "int64",  # d, parameters in the block
    "truth": "str",  # hessian, ggn, ...; "" where nothing is compared
    "approximation": "str",
    "damping": "float64",  # lambda of the damped metrics, NaN for the others
    "metric": "str",
    "value": "float64",
    "low": "float64",
    "high": "float64",
    "n": "int64",  # examples behind the number
    "seconds": "float64",  # training time so far, measuring and evaluation excluded
}


MATRIX_KEY = ("optimizer", "seed", "step", "block", "truth", "size")


def write_atomically(path: Path, content: bytes) -> Path:
    """Write bytes under a temporary name beside `path`, then move them into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp's file is its owner's alone; results are for everyone
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def new_run(results: Path, name: str) -> Path:
    """Create and return the folder of a new run, named <name>-<UTC time>-<4 random digits>."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    folder = Path(results) / f"{name}-{stamp}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    return folder


def write_header(run: Path, header: Mapping[str, Any]) -> Path:
    """Write (or replace) the run's header.json."""
    return write_atomically(run / "header.json", json.dumps(header, indent=2).encode())


def read_header(run: Path) -> dict[str, Any]:
    """Return the run's header; an empty one where the file is missing or damaged."""
    try:
        return dict(json.loads((run / "header.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def frame_of(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Turn rows into a frame with exactly the columns and types of COLUMNS.

    Raises: ValueError naming columns that are missing or unknown.
    """
    rows = list(rows)
    for row in rows:
        if row.keys() != COLUMNS.keys():
            missing, unknown = COLUMNS.keys() - row.keys(), row.keys() - COLUMNS.keys()
            raise ValueError(
                f"a record lacks columns {sorted(missing)} and has unknown columns "
                f"{sorted(unknown)}; the columns are {list(COLUMNS)}"
            )
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)


def append(run: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Add rows to the run as one new Parquet part; returns its path."""
    folder = run / "records"
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("part-*.parquet")))
    return put(run, f"{number:05d}", rows)


def put(run: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write rows as the run's part of this name, in place of what it held; returns its path."""
    content = frame_of(rows).to_parquet(index=False)
    return write_atomically(run / "records" / f"part-{name}.parquet", content)


def read(results: Path | str) -> pd.DataFrame:
    """Read all records below `results` (a results folder or one run's folder).

    Parts that cannot be read are left out and listed in `frame.attrs["damaged"]`, so that the
    reader can say so; an empty or missing folder gives an empty frame with all columns.
    """
    frames, damaged = [], []
    for part in sorted(Path(results).glob("**/records/part-*.parquet")):
        try:
            frame = pd.read_parquet(part)
            frames.append(frame[list(COLUMNS)].astype(COLUMNS))
        except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are ValueErrors
            damaged.append(f"{part}: {error}")
    whole = pd.concat(frames, ignore_index=True) if frames else frame_of([])
    whole.attrs["damaged"] = damaged
    return whole


def runs(results: Path | str) -> list[Path]:
    """Return the run folders below `results`, newest first, also those without a header."""
    folders = {
        p.parent for name in ("header.json", "records") for p in Path(results).glob(f"*/{name}")
    }
    return sorted(folders, key=lambda p: p.stat().st_mtime, reverse=True)


def save_matrices(
    run: Path, key: Mapping[str, str | int], matrices: Mapping[str, np.ndarray]
) -> Path:
    """Keep the matrices of one block against one truth at one step, for the block inspector.

    key: the columns of MATRIX_KEY; size is d, larger than the matrices where those were reduced by
    `reduce_matrix`. matrices: name -> [p, p]: "exact", each approximation under its name, and its
    difference from the exact one under `difference_name`.
    """
    folder = run / "matrices"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ("-".join(str(key[column]) for column in MATRIX_KEY[:-1]) + ".npz")
    content = io.BytesIO()
    arrays: dict[str, Any] = {name: m.astype(np.float32) for name, m in matrices.items()}
    np.savez_compressed(content, key=np.array(json.dumps(dict(key))), **arrays)
    return write_atomically(path, content.getvalue())


def difference_name(approximation: str) -> str:
    """Name under which the difference approximation - exact is stored."""
    return f"{approximation} - exact"


def list_matrices(run: Path) -> pd.DataFrame:
    """Index of the run's stored matrices: the columns of MATRIX_KEY, and path.

    Files that cannot be read are left out and listed in `frame.attrs["damaged"]`.
    """
    rows, damaged = [], []
    for path in sorted((run / "matrices").glob("*.npz")):
        try:
            with np.load(path) as file:
                rows.append({**json.loads(str(file["key"])), "path": str(path)})
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            damaged.append(f"{path}: {error}")
    index = pd.DataFrame(rows, columns=[*MATRIX_KEY, "path"])
    index.attrs["damaged"] = damaged
    return index


def load_matrices(path: Path | str) -> dict[str, np.ndarray]:
    """Return name -> [p, p] of one stored file."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files if name != "key"}


def reduce_matrix(matrix: np.ndarray, pixels: int = 240) -> np.ndarray:
    """Shrink [d, d] to at most [pixels, pixels]: each cell shows its entry of largest magnitude.

    A mean would hide single large entries and cancel signs.
    """
    d = len(matrix)
    if d <= pixels:
        return matrix
    step = -(-d // pixels)
    side = -(-d // step)
    if missing := side * step - d:
        matrix = np.pad(matrix, (0, missing))
    # whole rows first: they are compared with each other as they lie in memory
    rows = matrix.reshape(side, step, -1)
    high = rows.max(1).reshape(side, side, step).max(2)
    low = rows.min(1).reshape(side, side, step).min(2)
    return np.where(high >= -low, high, low)


def loss_row(name: str, value: float) -> dict[str, Any]:
    """A row about the whole model."""
    return {
        "block": "",
        "size": 0,
        "truth": "",
        "approximation": "",
        "damping": math.nan,
        "metric": name,
        "value": value,
        "low": math.nan,
        "high": math.nan,
        "n": 0,
    }
