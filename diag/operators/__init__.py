"""Operators: symmetric d x d matrices that know their structure, and functions of them.

An operator has `.shape` and `@`; a plain tensor is one. A structure that a function does not know
is computed densely, within a memory budget. Vectors are row-major vectors of W_bar = [W, b].
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
