"""KFAC, and KFAC as published in 2015."""

from .kfac import KFAC
from .kfac_2015 import KFAC2015

__all__ = ["KFAC", "KFAC2015"]
