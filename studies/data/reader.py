"""Readers of idx, CIFAR and MATLAB files.

Errors name the file, what was expected of it, what was found and the remedy.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

IDX_BYTES = 8  # the kind of idx files that hold unsigned bytes
REMEDY = "get it again, or point $KRONSCOPE_DATA to a folder that has it"


def read_idx(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes.

    Raises: FileNotFoundError or ValueError naming the file, the shape expected and what was found.
    """
    expected = f"gzipped idx file of uint8 {shape}"
    _require(path, expected)
    start = 4 + 4 * len(shape)
    try:
        content = gzip.decompress(path.read_bytes())
        zeros, kind, ndim = struct.unpack_from(">HBB", content)
        if zeros != 0 or kind != IDX_BYTES or ndim != len(shape):
            raise _refused(path, f"has header {content[:4]!r}", expected)
        found = struct.unpack_from(f">{ndim}I", content, 4)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise _refused(path, f"is damaged ({error})", expected) from error
    body = np.frombuffer(content, np.uint8, offset=start)
    if found != shape or body.size != int(np.prod(shape)):
        raise _refused(path, f"holds {found}, {body.size} bytes", expected)
    return body.reshape(shape)


def read_cifar(
    path: Path, classes: int, labels: int = 1, count: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Read pictures [n, 3, 32, 32] and labels [n] of a file in the binary version of CIFAR.

    A record has its labels, a byte each (CIFAR-10 one, CIFAR-100 the coarse one, then the fine
    one; the last is returned), then its red, green and blue planes. count: of the records, where
    the file has to have so many.

    Raises: FileNotFoundError or ValueError naming the file, what was expected and what was found.
    """
    size = labels + 3 * 32 * 32
    expected = f"CIFAR-{classes} batch in the binary version, records of {size} bytes"
    _require(path, expected)
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) == 0 or len(raw) % size:
        raise _refused(path, f"has {len(raw)} bytes, not a multiple of {size}", expected)
    records = raw.reshape(-1, size)
    if count not in (None, len(records)):
        raise _refused(path, f"holds {len(records)} records, not {count}", expected)
    found = records[:, labels - 1]
    if found.max() >= classes:
        says = f"holds the label {found.max()}; CIFAR-{classes} has 0 to {classes - 1}"
        raise _refused(path, says, expected)
    return records[:, labels:].reshape(-1, 3, 32, 32), found


def read_matlab(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Read arrays of unsigned bytes from a MATLAB file, by variable.

    Raises: FileNotFoundError or ValueError naming the file, what was expected and what was found.
    """
    from scipy.io import loadmat

    expected = "MATLAB file with " + ", ".join(f"{k}: uint8 {v}" for k, v in shapes.items())
    _require(path, expected)
    try:
        content = loadmat(path, variable_names=list(shapes))
    except Exception as error:  # what a damaged file makes of the parser has no common type
        raise _refused(path, f"is damaged ({type(error).__name__}: {error})", expected) from error
    for name, shape in shapes.items():
        array = content.get(name)
        if array is None:
            raise _refused(path, f"has no variable {name}", expected)
        if array.dtype != np.uint8 or array.shape != shape:
            raise _refused(path, f"holds {name}: {array.dtype} {array.shape}", expected)
    return {name: content[name] for name in shapes}


def _require(path: Path, expected: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a {expected}; {REMEDY}")


def _refused(path: Path, found: str, expected: str) -> ValueError:
    return ValueError(f"{path} {found}; expected a {expected}; {REMEDY}")
