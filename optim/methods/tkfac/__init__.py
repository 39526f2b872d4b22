"""TKFAC: trace-restricted KFAC."""

from .tkfac import TKFAC

__all__ = ["TKFAC"]
