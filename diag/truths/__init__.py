"""Exact curvature blocks as stored: means of per-example terms, dense, or matrix-free."""

from .kronecker_terms import KroneckerTerms
from .low_rank_terms import LowRankTerms
from .matrix_free import MatrixFree
from .per_example import PerExampleTerms
from .solving import NotSolvedError

__all__ = ["KroneckerTerms", "LowRankTerms", "MatrixFree", "NotSolvedError", "PerExampleTerms"]
