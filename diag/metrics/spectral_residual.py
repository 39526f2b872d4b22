"""Relative error in the spectral norm."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..operators.compositions import Difference
from ..registry import metric
from ..spectra.eigenspaces import Eigenpair, dominant
from ..statistics.influence import of_form, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "spectral_residual",
    formula="‖C − B‖₂ / ‖C‖₂",
    range="[0, ∞)",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
)
def spectral_residual(truth: Operator, approximation: Operator) -> Estimate:
    """Error in the direction where it is greatest, in units of the greatest curvature.

    ‖C − B‖₂ / ‖C‖₂, each norm the greatest |eigenvalue|: by full decomposition up to d = 400, else
    by Lanczos from products with C and B alone. Range [0, ∞), 0 is best; NaN for a zero truth.
    Interval: first order, x·(T_n − C)x at the eigenvector x of each norm; none where C − B is zero,
    for a norm has no derivative there.

    Raises: diag.spectrum.NotConvergedError where Lanczos does not converge.
    """
    greatest = dominant(truth)
    scale, n = abs(greatest.value), getattr(truth, "n", 0)
    if not scale:
        return Estimate(math.nan, n=n)
    residual = dominant(Difference(truth, approximation), scale)
    value = abs(residual.value) / scale
    if not isinstance(truth, PerExampleTerms) or not residual.value:
        return Estimate(value, n=n)
    gained, grown = (_change(truth, pair) / scale for pair in (residual, greatest))
    return within(from_influence(value, gained - value * grown, n), 0.0, math.inf)


def _change(truth: PerExampleTerms, pair: Eigenpair) -> Tensor:
    """Each example's influence on the size of an eigenvalue, [N]."""
    return math.copysign(1.0, pair.value) * of_form(truth, pair.vector, pair.vector)
