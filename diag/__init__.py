"""Exact curvature blocks of a network, approximations of them, and metrics between the two.

problem = Problem(model, loss, inputs, targets)
block = problem.block("encoder.0")
truth = exact.ggn(problem, block)
relative_error(truth, approximations.kfac(problem, block))
"""

from . import approximations, cross_fit, exact, live, metrics, off_diagonal, randomized, spectra
from .estimate import Estimate
from .operators import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    dense,
    diagonal,
    frobenius_norm,
    inner,
    solve,
    to_scipy,
    trace,
)
from .problem import Block, Problem
from .truths.solving import NotSolvedError

__all__ = [
    "Block",
    "BlockDiagonal",
    "Damped",
    "Dense",
    "Diagonal",
    "Estimate",
    "Inverse",
    "Kronecker",
    "KroneckerSum",
    "LowRank",
    "NotSolvedError",
    "Operator",
    "Problem",
    "approximations",
    "cross_fit",
    "dense",
    "diagonal",
    "exact",
    "frobenius_norm",
    "inner",
    "live",
    "metrics",
    "off_diagonal",
    "randomized",
    "solve",
    "spectra",
    "to_scipy",
    "trace",
]
