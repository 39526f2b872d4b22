"""Shampoo: inverse roots of each tensor axis' gradient covariance."""

from .shampoo import Shampoo

__all__ = ["Shampoo"]
