"""Stein divergence of the truth, seen by the approximation."""

import math

from ..estimate import Estimate
from ..operators import Operator
from ..operators.compositions import Difference
from ..registry import metric
from ..spectra.pencils import inner_with, inverse_moment, inverses, log_determinant, within_reach
from ..statistics.influence import of_inner, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "stein_divergence",
    formula="tr((B + μI)⁻¹(C + λI)) − log det((B + μI)⁻¹(C + λI)) − d",
    range="[0, ∞]",
    best="0",
    reference="James and Stein 1961",
    needs=("damping",),
)
def stein_divergence(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Twice KL(N(0, C + λI) ‖ N(0, B + μI)), the Kullback-Leibler divergence, in nats.

    Σ_j (ν_j − log ν_j − 1) over the eigenvalues ν of (B + μI)⁻¹(C + λI), summed over all d
    directions. Range [0, ∞], 0 is best; ∞ where either matrix is not positive definite. Curvature
    that B misses (ν > 1) costs most; `stein_divergence_reverse` punishes what B makes up.
    damping: λ of the truth. approximation_damping: added to B, the same λ unless given; 0 for the
    inverse of a live preconditioner, which has its damping inside.
    Exact: determinants from structure, else Cholesky factors.
    Interval: first order, <T_n − C, (B + μI)⁻¹ − (C + λI)⁻¹>, the approximation held fixed.

    Raises: ValueError over the memory budget, naming what to ask instead.
    """
    truth = within_reach(truth, "stein_divergence")
    added = damping if approximation_damping is None else approximation_damping
    n, d = getattr(truth, "n", 0), truth.shape[0]
    logs = log_determinant(truth, damping), log_determinant(approximation, added)
    if logs[0] is None or logs[1] is None:
        return Estimate(math.inf, n=n)
    P, Q = inverses(truth, damping, approximation, added)
    traced = inner_with(truth, P) + damping * inverse_moment(approximation, added, P, 1)
    value = max(traced - logs[0] + logs[1] - d, 0.0)  # rounding below zero
    if not isinstance(truth, PerExampleTerms):
        return Estimate(value, n=n)
    influence = of_inner(truth, Difference(P, Q))
    return within(from_influence(value, influence, n), 0.0, math.inf)
