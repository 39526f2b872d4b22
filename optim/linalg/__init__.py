"""Batched linear algebra and matrix products of the optimizers."""

from .basics import damped_inverse
from .operators import BlockDiagonal, Identity, Kronecker, Operator

__all__ = ["BlockDiagonal", "Identity", "Kronecker", "Operator", "damped_inverse"]
