"""Operators: symmetric d x d matrices that know their structure.

An operator owes `.shape` and `@`; a plain tensor is one. Everything else is a free function:
`dense`, `diagonal`, `trace`, `inner`, `frobenius_norm`, `solve`. Structure that a function does
not know is handled densely, within a memory budget, never by another formula.
All matrices act on row-major vectors of W_bar = [W, b].
"""

from .forms import BUDGET, dense, diagonal, trace
from .products import frobenius_norm, inner, inner_rule
from .scipy_interface import to_scipy
from .single_step import SingleStep
from .solving import Inverse, dense_inverse, inverse, keep, solve, solver
from .structures import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    like,
)

__all__ = [
    "BUDGET",
    "BlockDiagonal",
    "Damped",
    "Dense",
    "Diagonal",
    "Inverse",
    "Kronecker",
    "KroneckerSum",
    "LowRank",
    "Operator",
    "SingleStep",
    "dense",
    "dense_inverse",
    "diagonal",
    "frobenius_norm",
    "inner",
    "inner_rule",
    "inverse",
    "keep",
    "like",
    "solve",
    "solver",
    "to_scipy",
    "trace",
]
