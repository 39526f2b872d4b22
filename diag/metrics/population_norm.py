"""Frobenius norm of the population's block."""

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.moments import check_terms
from ..statistics.population import norm_estimate


@metric(
    formula="√max(U, 0), U = Σ_{n≠m} <T_n, T_m> / (N (N − 1))",
    range="[0, ∞)",
    best="none: the unit of the others",
    reference="U-statistics: Hoeffding 1948",
)
def population_norm(truth: Operator, approximation: Operator | None = None) -> Estimate:
    """Frobenius norm ‖E C‖_F of the block over all examples there are, from a batch of them.

    U is unbiased for ‖E C‖², where the batch's own ‖C‖² is too large by the squared sampling
    noise. Where the batch cannot tell E C from zero U may be negative and the norm reported is 0.
    Range [0, ∞), unit of the curvature. With two examples there is no interval.
    Interval: bootstrap-t on a logarithmic scale; covers in 0.92 to 0.97 of batches of 30 to 300, in
    0.86 to 0.93 where heavy tails put the sampling noise near the norm or above it.

    approximation: not used; all metrics are called alike.
    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    del approximation
    return norm_estimate(check_terms(truth, "population_norm"))
