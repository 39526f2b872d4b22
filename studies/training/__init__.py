"""Train any optimizer on any problem, one step at a time."""

from .loop import (
    FOREVER,
    NUMERICAL_ERRORS,
    DivergedError,
    Settings,
    batch,
    batch_loss,
    evaluate,
    evaluated,
    place,
    start,
    steps,
)
from .state import TrainingState

__all__ = [
    "FOREVER",
    "NUMERICAL_ERRORS",
    "DivergedError",
    "Settings",
    "TrainingState",
    "batch",
    "batch_loss",
    "evaluate",
    "evaluated",
    "place",
    "start",
    "steps",
]
