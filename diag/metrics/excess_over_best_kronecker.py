"""Excess of the relative error over that of the best Kronecker product."""

from ..estimate import Estimate
from ..operators import Kronecker, Operator, keep
from ..registry import metric
from ..spectra.kronecker_svd import leading_kronecker
from ..statistics.intervals import from_replicates, norms
from .relative_error_best_scale import best_scale_error


@metric(
    formula="(‖C − B‖_F − min_{G,A} ‖C − G⊗A‖_F) / ‖C‖_F",
    range="[0, ∞) for a Kronecker product B; below 0 only for richer structures",
    best="0",
    reference="Van Loan and Pitsianis 1993",
)
def excess_over_best_kronecker(truth: Operator, approximation: Operator) -> Estimate:
    """Relative error of B less that of the best Kronecker product G ⊗ A.

    Range [0, ∞) for a Kronecker product, 0 is best; negative for richer structures that beat all
    products. Interval: bootstrap over the truth's examples; the best product's factors are held
    fixed up to scale, which is exact to first order.

    Raises: ValueError for a dense truth, whose factor sizes are unknown.
    """
    best = keep(truth, "best_kronecker", lambda: leading_kronecker(truth, 1).terms[0])
    found, least = norms(truth, approximation), norms(truth, best)
    excess = (found.error / found.square).sqrt() - best_scale_error(least)
    if isinstance(approximation, Kronecker):  # no product is better than the best of a replicate
        excess = excess.clamp(min=0)
    return from_replicates(excess, truth)
