"""Training any optimizer on any problem, one step at a time."""

from .loop import (
    FOREVER,
    IN_THE_NUMBERS,
    DivergedError,
    Settings,
    batch,
    batch_loss,
    evaluate,
    evaluated,
    start,
    steps,
)
from .state import State

__all__ = [
    "FOREVER",
    "IN_THE_NUMBERS",
    "DivergedError",
    "Settings",
    "State",
    "batch",
    "batch_loss",
    "evaluate",
    "evaluated",
    "start",
    "steps",
]
