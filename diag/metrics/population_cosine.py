"""Matrix cosine with the population's block."""

from diag.estimate import Estimate
from diag.moments import unbiased_moments
from diag.operators import Operator
from diag.population import cosine_estimate
from diag.registry import metric


@metric(
    "population_cosine",
    formula="<C, B> / (√U ‖B‖_F), U = Σ_{n≠m} <T_n, T_m> / (N (N − 1)), cut to [−1, 1]",
    range="[−1, 1]",
    best="1",
    reference="U-statistics: Hoeffding 1948; interval: Fieller 1954",
)
def population_cosine(truth: Operator, approximation: Operator) -> Estimate:
    """Cosine <E C, B> / (‖E C‖_F ‖B‖_F) with the block over all examples there are.

    For an approximation that does not depend on the batch. The inner product and the squared norm
    are unbiased, the cosine is up to terms of order 1/N; the batch's own cosine is smaller, for
    sampling noise is in no direction that B knows. Range [−1, 1], 1 is best; cut to it, for U may
    come out too small. NaN where the batch cannot tell E C from zero (U <= 0).
    Interval: bootstrap-t by inverted tests, cut to [−1, 1]; two examples give none.

    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    return cosine_estimate(unbiased_moments(truth, approximation, "population_cosine"))
