"""Relative error in the Frobenius norm."""

from ..estimate import Estimate
from ..operators import Operator
from ..randomized.frobenius import probed_error
from ..registry import metric
from ..statistics.moments import batch_moments
from ..statistics.population import error_estimate
from ..truths.matrix_free import MatrixFree


@metric(
    formula="‖C − B‖_F / ‖C‖_F",
    range="[0, ∞)",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
)
def relative_error(truth: Operator, approximation: Operator) -> Estimate:
    """Frobenius norm of the difference over that of the truth, ‖C − B‖_F / ‖C‖_F.

    Range [0, ∞), 0 is best, 1 is no better than the zero matrix. NaN for a zero truth.
    Interval: bootstrap-t over the truth's examples, the approximation held fixed, for the error
    typical of batches of this size (for the population's: `population_error`). A truth known by
    products alone is estimated from 100 random probes, with their interval.
    """
    if isinstance(truth, MatrixFree):
        return probed_error(truth, approximation)
    return error_estimate(batch_moments(truth, approximation))
