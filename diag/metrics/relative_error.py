"""Relative Frobenius error."""

import math

from diag.estimate import Estimate
from diag.intervals import from_replicates, norms
from diag.operators import Operator
from diag.registry import metric


@metric(
    "relative_error",
    formula="‖C − B‖_F / ‖C‖_F",
    range="[0, ∞)",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
)
def relative_error(truth: Operator, approximation: Operator) -> Estimate:
    """Distance from the truth in units of the truth's own norm, ‖C − B‖_F / ‖C‖_F.

    Range [0, ∞), 0 is best, 1 is no better than the zero matrix. NaN for a zero truth.
    Interval: bootstrap over the truth's examples, the approximation held fixed.
    """
    found = norms(truth, approximation)
    return from_replicates((found.error / found.square).sqrt(), truth, undefined=math.inf)
