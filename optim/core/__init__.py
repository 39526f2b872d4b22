"""Shared optimizer machinery: layer batching, inversions, momentum, AMP, checkpoints."""

from .damping_schedule import Damping
from .errors import NumericalError
from .levenberg_marquardt import LevenbergMarquardt
from .stacks import Stack

__all__ = ["Damping", "LevenbergMarquardt", "NumericalError", "Stack"]
