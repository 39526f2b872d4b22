"""Randomized estimates of traces, diagonals, norms and spectra, with standard errors."""

from .estimators import (
    DiagonalEstimate,
    hutch_pp_trace,
    hutchinson_diagonal,
    hutchinson_trace,
    xtrace,
)
from .frobenius import frobenius_squared, inner_estimate, relative_error_estimate
from .lanczos_quadrature import SpectralDensity, spectral_density, spectral_sum
from .probes import ProbeEstimate, gaussian, rademacher

__all__ = [
    "DiagonalEstimate",
    "ProbeEstimate",
    "SpectralDensity",
    "frobenius_squared",
    "gaussian",
    "hutch_pp_trace",
    "hutchinson_diagonal",
    "hutchinson_trace",
    "inner_estimate",
    "rademacher",
    "relative_error_estimate",
    "spectral_density",
    "spectral_sum",
    "xtrace",
]
