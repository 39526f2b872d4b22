"""Cosine of the angle between truth and approximation as matrices."""

from ..estimate import Estimate
from ..operators import Operator
from ..randomized.frobenius import probed_cosine
from ..registry import metric
from ..statistics.moments import batch_moments
from ..statistics.population import cosine_estimate
from ..truths.matrix_free import MatrixFree


@metric(
    formula="<C, B> / (‖C‖_F ‖B‖_F)",
    range="[−1, 1]",
    best="1",
    reference="Golub and Van Loan 2013, section 2.3",
)
def cosine(truth: Operator, approximation: Operator) -> Estimate:
    """Cosine of the angle between the two matrices, <C, B> / (‖C‖_F ‖B‖_F).

    Range [−1, 1], 1 is best; blind to scale. NaN if either matrix is zero.
    Interval: bootstrap-t over the truth's examples, the approximation held fixed, for the cosine
    typical of batches of this size (for the population's: `population_cosine`). A truth known by
    products alone is estimated from 100 random probes, with their interval.
    """
    if isinstance(truth, MatrixFree):
        return probed_cosine(truth, approximation)
    return cosine_estimate(batch_moments(truth, approximation))
