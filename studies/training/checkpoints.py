"""Checkpoints of a training: written atomically, readable on any machine."""

import pickle
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .state import TrainingState

PARTS = ("model", "optimizer", "averaged", "scheduler", "step", "seconds", "first")
EXPECTED = "a checkpoint that `kronscope train` wrote"
REMEDY = "take a copy of it or another run's, or train anew without --resume"
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError),
    *(OSError, EOFError, RuntimeError, ValueError),
)
MISFITS = (KeyError, IndexError, RuntimeError, ValueError, TypeError, AttributeError)


def save_parameters(parameters: dict[str, Tensor], path: Path) -> None:
    """Write a model's state_dict atomically."""
    _write(parameters, path)


def _write(content: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    temporary.replace(path)


def save(state: "TrainingState", path: Path) -> None:
    """Write a checkpoint from which `steps(settings, resume=path)` goes on."""
    content = {
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "averaged": None if state.averaged is None else state.averaged.state_dict(),
        "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
        "step": state.step,
        "seconds": state.seconds,
        "first": state.first,
        "of": state.of,
    }
    _write(content, path)


def load(state: "TrainingState", path: Path) -> None:
    """Put a checkpoint's model, optimizer and counters into a fresh state.

    Raises: ValueError naming a missing file, a damaged one, or one of another problem or optimizer.
    """
    content = read(path)
    if content.get("of", state.of) != state.of:  # those of before had no names
        raise _misfit(path, state.of, " and ".join(content["of"]))
    try:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.averaged is not None:
            state.averaged.load_state_dict(content["averaged"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(content["scheduler"])
        state.step, state.seconds = int(content["step"]), float(content["seconds"])
        state.first = content["first"]
    except MISFITS as error:
        raise _misfit(path, state.of, str(error)) from error


def load_model(model: nn.Module, problem: str, path: Path) -> None:
    """Put a checkpoint's parameters into the problem's model. Raises: ValueError as `load`."""
    content = read(path)
    found = content.get("of", (problem,))
    if found[0] != problem:
        raise _misfit(path, (problem,), found[0])
    try:
        model.load_state_dict(content["model"])
    except MISFITS as error:
        raise _misfit(path, (problem,), str(error)) from error


def _misfit(path: Path, wanted: tuple[str, ...], found: str) -> ValueError:
    return ValueError(
        f"{path} is no checkpoint of {' and '.join(wanted)}: {found}; name the problem and "
        "optimizer that it is of, or the checkpoint of another run"
    )


def read(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint; GPU tensors are moved to the CPU where there is no GPU.

    The file is a zip archive with checksums, which are compared; torch.load does not.
    Raises: ValueError naming a file that is missing, damaged or no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}; `kronscope train` writes one after each epoch")
    place = None if torch.cuda.is_available() else "cpu"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise zipfile.BadZipFile(f"{damaged} does not fit its checksum")
        content = torch.load(path, map_location=place, weights_only=True)
    except UNREADABLE as error:
        raise ValueError(
            f"{path} cannot be read ({error}): it is cut off or damaged; expected {EXPECTED}; "
            f"{REMEDY}"
        ) from error
    missing = PARTS if not isinstance(content, Mapping) else sorted({*PARTS} - content.keys())
    if missing:
        raise ValueError(
            f"{path} holds a {type(content).__name__} without {', '.join(missing)}; expected "
            f"{EXPECTED}; {REMEDY}"
        )
    return dict(content)
