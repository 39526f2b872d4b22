"""Greatest eigenvalue of the preconditioned truth."""

import math

from ..estimate import Estimate
from ..operators import Operator, solver
from ..registry import metric
from ..spectra.preconditioned import NotPositiveDefiniteError
from ..spectra.sharpness import sharpest
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence

TOLERANCE = 1e-6  # of the residual, relative: the value's own error is of second order


@metric(
    formula="λ_max of (B + μI)⁻¹ C",
    range="(−∞, ∞]",
    best="none: steps are stable below 2 / lr",
    reference="Cohen et al. 2022, arXiv:2207.14484",
)
def preconditioned_sharpness(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Greatest eigenvalue of (B + μI)⁻¹ C, which limits the learning rate.

    Steps θ <- θ − lr (B + μI)⁻¹ g diverge on the quadratic model where lr times it exceeds 2, with
    averaged momentum `spectra.stability_limit`. The truth is not damped: damping is no part of the
    loss. ∞ where B + μI is found not to be positive definite.
    damping: μ unless approximation_damping is given, which is 0 where B has its damping inside.
    Interval: first order, u·(T_n − C)u at the eigenvector u.

    Raises: torch.linalg.LinAlgError for a singular damped approximation.
    """
    added = damping if approximation_damping is None else approximation_damping
    precondition = solver(approximation, added)
    try:
        found = sharpest(truth, precondition, tolerance=TOLERANCE)
    except NotPositiveDefiniteError:
        return Estimate(math.inf, n=getattr(truth, "n", 0))
    u = found.vector
    return from_influence(truth, found.value, lambda truth: of_form(truth, u, u))
