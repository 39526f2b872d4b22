"""Cosine between the population's block and an approximation."""

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.population import unbiased_cosine_estimate


@metric(
    formula="±√(Σ_{n≠m} <T_n, B> <T_m, B> / Σ_{n≠m} <T_n, T_m>) / ‖B‖_F, the sign of <C, B>",
    range="[−1, 1]",
    best="1",
    reference="U-statistics: Hoeffding 1948; interval: Fieller 1954",
)
def population_cosine(truth: Operator, approximation: Operator) -> Estimate:
    """Cosine <E C, B> / (‖E C‖_F ‖B‖_F) with the block over all examples there are.

    For an approximation that does not depend on the batch. <E C, B>² and ‖E C‖² are unbiased, from
    pairs of distinct examples, the cosine is up to terms of order 1/N; the batch's own is nearer 0.
    Range [−1, 1], to which it is cut; 1 is best. NaN where the batch cannot tell E C from zero.
    Interval: bootstrap-t of the ratio by inverted tests; of either sign where the cosine may be 0.
    Covers in 0.92 to 0.98 of batches of 30 to 300, in more where E C may be zero, in 0.89 at worst
    (empirical Fisher with noise as large as its norm). Two examples give none.

    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    return unbiased_cosine_estimate(truth, approximation, "population_cosine")
