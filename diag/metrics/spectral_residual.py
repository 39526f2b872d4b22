"""Relative error in the spectral norm."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..operators.compositions import Difference
from ..registry import metric
from ..spectra.eigenspaces import Eigenpair, dominant
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="‖C − B‖₂ / ‖C‖₂",
    range="[0, ∞)",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
)
def spectral_residual(truth: Operator, approximation: Operator) -> Estimate:
    """Spectral norm of the difference over that of the truth, ‖C − B‖₂ / ‖C‖₂.

    Each norm is the greatest |eigenvalue|: by full decomposition up to d = 400, else by Lanczos.
    Range [0, ∞), 0 is best; NaN for a zero truth.
    Interval: first order, x·(T_n − C)x at the eigenvector x of each norm; none where C = B.

    Raises: spectra.NotConvergedError where Lanczos does not converge.
    """
    greatest = dominant(truth)
    scale = abs(greatest.value)
    if not scale:
        return Estimate(math.nan, n=getattr(truth, "n", 0))
    residual = dominant(Difference(truth, approximation), scale)
    value = abs(residual.value) / scale

    def influence(truth: PerExampleTerms) -> Tensor:
        gained, grown = (_change(truth, pair) / scale for pair in (residual, greatest))
        return gained - value * grown

    return from_influence(truth, value, influence if residual.value else None, 0.0)


def _change(truth: PerExampleTerms, pair: Eigenpair) -> Tensor:
    """Each example's influence on the size of an eigenvalue, [N]."""
    return math.copysign(1.0, pair.value) * of_form(truth, pair.vector, pair.vector)
