"""The instrument: exact curvature blocks, approximations of them, and metrics between the two.

problem = Problem(model, loss, inputs, targets)
block = problem.block("encoder.0")
truth = exact.ggn(problem, block)
relative_error(truth, approximations.kfac(problem, block))
"""

from diag import approximations, exact, live, metrics
from diag.estimate import Estimate
from diag.operators import (
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
from diag.problem import Block, Problem
from diag.sample_solves import NotSolvedError

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
    "dense",
    "diagonal",
    "exact",
    "frobenius_norm",
    "inner",
    "live",
    "metrics",
    "solve",
    "to_scipy",
    "trace",
]
