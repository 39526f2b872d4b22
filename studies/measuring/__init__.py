"""Measuring a training's curvature against the truth."""

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
