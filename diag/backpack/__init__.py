"""Curvature by BackPACK, a second and independent engine, checked against torch.func."""

from . import quantities
from .support import UnsupportedError

__all__ = ["UnsupportedError", "quantities"]
