"""Exact curvature blocks as stored: means of per-example terms, dense, or matrix-free."""

from .kronecker_terms import SampleMean
from .low_rank_terms import RootMean
from .matrix_free import MatrixFree
from .per_example import Sampled
from .solving import NotSolvedError

__all__ = ["MatrixFree", "NotSolvedError", "RootMean", "SampleMean", "Sampled"]
