"""EKFAC: KFAC's eigenbasis with its own second moments."""

from .ekfac import EKFAC

__all__ = ["EKFAC"]
