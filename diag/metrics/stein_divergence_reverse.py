"""Stein's loss of the approximation as an estimate of the truth."""

import math

from ..estimate import Estimate
from ..operators import Damped, Operator, trace
from ..operators.compositions import Difference, Product
from ..registry import metric
from ..spectra.pencils import inverses, log_determinant, trace_with_inverse, within_reach
from ..statistics.influence import of_inner, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "stein_divergence_reverse",
    formula="tr((C + λI)⁻¹(B + μI)) − log det((C + λI)⁻¹(B + μI)) − d",
    range="[0, ∞]",
    best="0",
    reference="James and Stein 1961",
    needs=("damping",),
)
def stein_divergence_reverse(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Twice KL(N(0, B + μI) ‖ N(0, C + λI)), the Kullback-Leibler divergence, in nats.

    Σ_j (1/ν_j + log ν_j − 1) over the eigenvalues ν of (B + μI)⁻¹(C + λI), summed over all d
    directions. Range [0, ∞], 0 is best; ∞ where either matrix is not positive definite. Curvature
    that B makes up (ν < 1) costs most; `stein_divergence` punishes what B misses.
    damping: λ of the truth. approximation_damping: added to B, the same λ unless given; 0 for the
    inverse of a live preconditioner, which has its damping inside.
    Exact: determinants from structure, else Cholesky factors.
    Interval: first order, <T_n − C, Q − Q(B + μI)Q> with Q = (C + λI)⁻¹, the approximation held
    fixed.

    Raises: ValueError over the memory budget, naming what to ask instead.
    """
    truth = within_reach(truth, "stein_divergence_reverse")
    added = damping if approximation_damping is None else approximation_damping
    n, d = getattr(truth, "n", 0), truth.shape[0]
    logs = log_determinant(truth, damping), log_determinant(approximation, added)
    if logs[0] is None or logs[1] is None:
        return Estimate(math.inf, n=n)
    _, Q = inverses(truth, damping, approximation, added)
    damped = Damped(approximation, added)
    traced = trace_with_inverse(truth, damping, Q, damped, trace(approximation) + d * added)
    value = max(traced - logs[1] + logs[0] - d, 0.0)  # rounding below zero
    if not isinstance(truth, PerExampleTerms):
        return Estimate(value, n=n)
    influence = of_inner(truth, Difference(Q, Product([Q, damped, Q])))
    return within(from_influence(value, influence, n), 0.0, math.inf)
