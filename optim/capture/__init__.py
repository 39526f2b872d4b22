"""Capture of layer inputs and pre-activation gradients by hooks, and sampled labels."""

from . import positions
from .capture import Call, Totals

__all__ = ["Call", "Totals", "positions"]
