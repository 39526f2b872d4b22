"""MBF: mini-block Fisher."""

from .mbf import MBF

__all__ = ["MBF"]
