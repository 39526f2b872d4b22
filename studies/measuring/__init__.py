"""Measuring a training's curvature against the truth."""

from .during_training import Alongside
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
    "Alongside",
    "Plan",
    "definitions",
    "layers",
    "live_curvatures",
    "matrices",
    "measure",
    "not_measured",
    "operators",
]
