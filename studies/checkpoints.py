"""Checkpoints of a training: written whole or not at all, and read on any machine."""

import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from studies.training import State


def save_parameters(parameters: dict[str, Tensor], path: Path) -> None:
    """Write a model's state_dict, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(parameters, temporary)
    temporary.replace(path)


def save(state: "State", path: Path) -> None:
    """Write a checkpoint from which `steps(settings, resume=path)` goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "averaged": None if state.averaged is None else state.averaged.state_dict(),
            "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
            "step": state.step,
            "seconds": state.seconds,
            "first": state.first,
        },
        temporary,
    )
    temporary.replace(path)


def load(state: "State", path: Path) -> None:
    """Put a checkpoint's model, optimizer and counters into a fresh state.

    Raises: ValueError naming a missing file, a broken one, or one of another model or optimizer.
    """
    try:
        content = read(path)
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.averaged is not None:
            state.averaged.load_state_dict(content["averaged"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(content["scheduler"])
        state.step, state.seconds = content["step"], content["seconds"]
        state.first = content["first"]
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint of this problem and optimizer: {error}"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """What is in a checkpoint; tensors of a GPU come to the CPU where there is none.

    Raises: ValueError naming a file that is missing or no checkpoint.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}; `kronscope train` writes one after each epoch")
    place = None if torch.cuda.is_available() else "cpu"
    try:
        content: dict[str, Any] = torch.load(path, map_location=place, weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({error}); it may be cut off: train anew"
        ) from error
    return content
