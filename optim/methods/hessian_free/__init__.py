"""Hessian-free, plain and block-diagonal."""

from .conjugate_gradients import RelativeProgress
from .hessian_free import HessianFree
from .options import AdaptiveDamping, Backtracking, DiagonalPreconditioner, LineSearch

__all__ = [
    "AdaptiveDamping",
    "Backtracking",
    "DiagonalPreconditioner",
    "HessianFree",
    "LineSearch",
    "RelativeProgress",
]
