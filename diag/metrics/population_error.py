"""Relative error in the Frobenius norm against the population's block."""

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.moments import unbiased_moments
from ..statistics.population import error_estimate


@metric(
    formula="√max((U − 2<C, B> + ‖B‖²) / U, 0), U = Σ_{n≠m} <T_n, T_m> / (N (N − 1))",
    range="[0, ∞]",
    best="0",
    reference="U-statistics: Hoeffding 1948; interval: Fieller 1954",
)
def population_error(truth: Operator, approximation: Operator) -> Estimate:
    """Relative error ‖E C − B‖_F / ‖E C‖_F against the block over all examples there are.

    For an approximation that does not depend on the batch (a live state, another batch); its
    relative error on the batch is larger, by the batch's sampling noise. Both squares are unbiased,
    the ratio up to terms of order 1/N. Range [0, ∞], 0 is best, also reported where the numerator
    is negative (half of all batches if B = E C). ∞ where the batch cannot tell E C from zero
    (U <= 0), NaN if the numerator is not positive either.
    For B built from the same batch: `kronscope.diag.cross_fit.cross_fit`.
    Interval: bootstrap-t of the ratio by inverted tests; open (∞) where E C may be zero. Covers in
    0.93 to 0.98 of batches of 30 to 300, in more at B = E C and where it is open. Two examples give
    none.

    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    return error_estimate(unbiased_moments(truth, approximation, "population_error"))
