"""Measure approximations of a training's curvature against the exact blocks."""

from .during_training import DuringTraining
from .measurement import (
    Plan,
    definitions,
    layers,
    live_curvatures,
    matrices,
    measure,
    not_measured,
    operators,
)

__all__ = [
    "DuringTraining",
    "Plan",
    "definitions",
    "layers",
    "live_curvatures",
    "matrices",
    "measure",
    "not_measured",
    "operators",
]
