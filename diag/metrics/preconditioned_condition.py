"""Condition number of the preconditioned truth."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..spectra.preconditioned import (
    NotPositiveDefiniteError,
    PencilPair,
    preconditioned_extremes,
    square_root,
)
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "preconditioned_condition",
    formula="λ_max / λ_min of (B + μI)^−½ (C + λI) (B + μI)^−½",
    range="[1, ∞]",
    best="1",
    reference="Saad 2003, section 9.2",
    needs=("damping",),
)
def preconditioned_condition(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Condition number of B^-½ (C + λI) B^-½: 1 if the approximation is perfect up to scale.

    It bounds the convergence of gradient descent preconditioned with B. Range [1, ∞], 1 is best;
    ∞ where C + λI or B + μI is not positive definite, as those of a Hessian may not be.
    damping: λ of the truth. approximation_damping: added to B, the same λ unless given; 0 for the
    inverse of a live preconditioner, which has its damping inside.
    Interval: first order, from each example's influence on the two extreme eigenvalues.
    """
    added = damping if approximation_damping is None else approximation_damping
    n = getattr(truth, "n", 0)
    try:
        root = square_root(approximation, added)
        least, greatest = preconditioned_extremes(truth, damping, root)
    except NotPositiveDefiniteError:
        return Estimate(math.inf, n=n)
    condition = greatest.value / least.value
    if not isinstance(truth, PerExampleTerms):
        return Estimate(condition, n=n)
    shares = [_shares(truth, pair) / pair.value for pair in (greatest, least)]
    found = from_influence(condition, condition * (shares[0] - shares[1]), n, log=True)
    return Estimate(found.value, max(found.low, 1.0), found.high, found.n)


def _shares(truth: PerExampleTerms, pair: PencilPair) -> Tensor:
    """Each example's influence on an eigenvalue: x·(T_n - C)x, with B held fixed, [N]."""
    each = truth.quadratic(pair.x, pair.x)
    return each - each.mean()
