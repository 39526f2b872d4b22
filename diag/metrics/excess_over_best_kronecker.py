"""Excess over the best Kronecker approximation."""

import math

from ..estimate import Estimate
from ..operators import Kronecker, Operator, keep
from ..registry import metric
from ..spectra.kronecker_svd import leading_kronecker
from ..statistics.intervals import from_replicates, norms
from .relative_error_best_scale import best_scale_error


@metric(
    "excess_over_best_kronecker",
    formula="(‖C − B‖_F − min_{G,A} ‖C − G⊗A‖_F) / ‖C‖_F",
    range="[0, ∞) for a Kronecker product B; below 0 only for richer structures",
    best="0",
    reference="Van Loan and Pitsianis 1993",
)
def excess_over_best_kronecker(truth: Operator, approximation: Operator) -> Estimate:
    """How much of the relative error is the method's own and not the price of one product G ⊗ A.

    The difference between the relative errors of B and of the best Kronecker product. Range
    [0, ∞) for a Kronecker product, 0 is best; negative where B is no Kronecker product and beats
    them all. Interval: bootstrap over the truth's examples; the best product's factors are held
    fixed up to scale, which is exact to first order because they are stationary.

    Raises: ValueError for a dense truth, whose factor sizes are unknown.
    """
    best = keep(truth, "best_kronecker", lambda: leading_kronecker(truth, 1).terms[0])
    found, least = norms(truth, approximation), norms(truth, best)
    excess = (found.error / found.square).sqrt() - best_scale_error(least)
    if isinstance(approximation, Kronecker):  # no product is better than the best of a replicate
        excess = excess.clamp(min=0)
    return from_replicates(excess, truth, undefined=math.inf)
