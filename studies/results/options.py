"""Validate options before any work starts; errors state the value and what is possible."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

import torch

LARGEST_SEED = 2**32 - 1
LEAST = {
    "epochs": 0,
    "tune_epochs": 0,
    "batch_size": 0,
    "seed": 0,
    "seeds": 1,
    "spares": 0,
    "longer": 1,
    "steps": 1,
    "layers_every": 0,
    "examples": 1,
    "points": 1,
    "damped_every": 1,
    "workers": 1,
}
POSITIVE = ("lr_factors", "damping_factors", "adam_lr_factors", "seconds")


def options(given: Mapping[str, Any]) -> None:
    """Check the value of each known option; other names are not checked.

    Raises: ValueError naming the option, its value and what is possible.

    >>> options({"epochs": 3, "device": "cpu"})
    >>> options({"epochs": -1})
    Traceback (most recent call last):
    ValueError: epochs is -1; it is a whole number of at least 0
    """
    for name, value in given.items():
        if name in LEAST:
            whole_number(name, value)
        elif name == "device":
            device(value)
        elif name in POSITIVE and not all(0 < v < math.inf for v in value):
            raise ValueError(f"{name} are {list(value)}; they are positive, finite numbers")


def whole_number(name: str, value: Any) -> None:
    """Check a whole number against its least value. Raises: ValueError with value and least."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < LEAST[name]:
        raise ValueError(f"{name} is {value!r}; it is a whole number of at least {LEAST[name]}")
    if name == "seed" and int(value) > LARGEST_SEED:
        raise ValueError(f"seed is {value}; it is at most {LARGEST_SEED}")


def device(name: str) -> None:
    """Check that a device exists. Raises: ValueError listing the devices."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["cuda"] if count else []), *(f"cuda:{k}" for k in range(count))]
    if name not in known:
        why = "" if count or not str(name).startswith("cuda") else " (PyTorch finds no CUDA here)"
        raise ValueError(f"no device '{name}'{why}; known: {known}")
