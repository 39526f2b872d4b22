"""Stein divergence of the truth from the approximation (between Gaussians)."""

import math

from ..estimate import Estimate
from ..operators import Operator
from ..operators.compositions import Difference
from ..registry import metric
from ..spectra.pencils import inner_with, inverse_moment, inverses, log_determinant, within_reach
from ..statistics.influence import of_inner
from ..statistics.intervals import from_influence


@metric(
    formula="tr((B + μI)⁻¹(C + λI)) − log det((B + μI)⁻¹(C + λI)) − d",
    range="[0, ∞]",
    best="0",
    reference="James and Stein 1961",
)
def stein_divergence(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Twice the Kullback-Leibler divergence KL(N(0, C + λI) ‖ N(0, B + μI)), in nats.

    Σ_j (ν_j − log ν_j − 1) over the eigenvalues ν of (B + μI)⁻¹(C + λI), summed over all d
    directions. Range [0, ∞], 0 is best; ∞ where either matrix is not positive definite. Curvature
    that B misses (ν > 1) costs most; `stein_divergence_reverse` punishes what B makes up.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Exact: determinants from structure, else Cholesky factors.
    Interval: first order, <T_n − C, (B + μI)⁻¹ − (C + λI)⁻¹>, the approximation held fixed.

    Raises: ValueError over the memory budget, naming what to ask instead.
    """
    truth = within_reach(truth, "stein_divergence")
    added = damping if approximation_damping is None else approximation_damping
    logs = log_determinant(truth, damping), log_determinant(approximation, added)
    if logs[0] is None or logs[1] is None:
        return Estimate(math.inf, n=getattr(truth, "n", 0))
    P, Q = inverses(truth, damping, approximation, added)
    traced = inner_with(truth, P) + damping * inverse_moment(approximation, added, P, 1)
    value = max(traced - logs[0] + logs[1] - truth.shape[0], 0.0)  # rounding below zero
    slope = Difference(P, Q)
    return from_influence(truth, value, lambda truth: of_inner(truth, slope), 0.0)
