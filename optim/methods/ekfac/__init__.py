"""EKFAC and EKFAC-ra."""

from .ekfac import EKFAC, EKFACra

__all__ = ["EKFAC", "EKFACra"]
