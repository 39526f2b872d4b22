"""KFAC: Kronecker-factored approximate curvature."""

from .kfac import KFAC

__all__ = ["KFAC"]
