"""Greatest eigenvalue of the preconditioned truth."""

import math

from ..estimate import Estimate
from ..operators import Operator, solver
from ..registry import metric
from ..spectra.preconditioned import NotPositiveDefiniteError
from ..spectra.sharpness import sharpest
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms

TOLERANCE = 1e-6  # of the residual, relative: the value's own error is of second order


@metric(
    "preconditioned_sharpness",
    formula="λ_max of (B + μI)⁻¹ C",
    range="(−∞, ∞]",
    best="none: steps are stable below 2 / lr",
    reference="Cohen et al. 2022, arXiv:2207.14484",
    needs=("damping",),
)
def preconditioned_sharpness(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Greatest eigenvalue of (B + μI)⁻¹ C, which limits the learning rate.

    Steps θ <- θ − lr (B + μI)⁻¹ g diverge on the quadratic model where lr times it exceeds 2, with
    averaged momentum `sharpness.stability_limit`. 1 where B + μI is no less than C in any
    direction and equal in one. The truth is not damped: its damping is no part of the loss.
    damping: μ unless approximation_damping is given; that is 0 for the inverse of a live
    preconditioner, which has its damping inside.
    ∞ where B + μI shows that it is not positive definite: its steps go up.
    Interval: first order, from each example's influence u·(T_n − C)u; its vector u held fixed.

    Raises: torch.linalg.LinAlgError for a singular damped approximation.
    """
    added = damping if approximation_damping is None else approximation_damping
    precondition = solver(approximation, added)
    n = getattr(truth, "n", 0)
    try:
        found = sharpest(truth, precondition, tolerance=TOLERANCE)
    except NotPositiveDefiniteError:
        return Estimate(math.inf, n=n)
    if not isinstance(truth, PerExampleTerms):
        return Estimate(found.value, n=n)
    return from_influence(found.value, of_form(truth, found.vector, found.vector), n)
