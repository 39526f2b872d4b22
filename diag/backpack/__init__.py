"""Curvature by BackPACK, a second and independent engine, checked against torch.func."""

from .quantities import (
    diag_fisher_mc,
    diag_ggn,
    diag_hessian,
    empirical_fisher,
    fisher_mc,
    ggn,
    kfac,
    kflr,
    kfra,
)
from .support import UnsupportedError

__all__ = [
    "UnsupportedError",
    "diag_fisher_mc",
    "diag_ggn",
    "diag_hessian",
    "empirical_fisher",
    "fisher_mc",
    "ggn",
    "kfac",
    "kflr",
    "kfra",
]
