"""Eigenvalues, extreme eigenpairs, preconditioned spectra and Kronecker singular values."""

from .eigenspaces import leading_space
from .eigenvalues import eigenvalues
from .extreme_eigenpairs import Eigenpairs, NotConvergedError, bottom_eigenpairs, top_eigenpairs
from .kronecker_rank import best_kronecker_curve
from .kronecker_svd import best_kronecker_errors, leading_kronecker
from .preconditioned import NotPositiveDefiniteError, preconditioned_extremes
from .sharpness import NotFiniteError, sharpest, side_by_side, stability_limit

__all__ = [
    "Eigenpairs",
    "NotConvergedError",
    "NotFiniteError",
    "NotPositiveDefiniteError",
    "best_kronecker_curve",
    "best_kronecker_errors",
    "bottom_eigenpairs",
    "eigenvalues",
    "leading_kronecker",
    "leading_space",
    "preconditioned_extremes",
    "sharpest",
    "side_by_side",
    "stability_limit",
    "top_eigenpairs",
]
