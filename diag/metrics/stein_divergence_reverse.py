"""Stein divergence of the approximation from the truth (between Gaussians)."""

import math

from ..estimate import Estimate
from ..operators import Damped, Operator, trace
from ..operators.compositions import Difference, Product
from ..registry import metric
from ..spectra.pencils import inverses, log_determinant, trace_with_inverse, within_reach
from ..statistics.influence import of_inner
from ..statistics.intervals import from_influence


@metric(
    formula="tr((C + λI)⁻¹(B + μI)) − log det((C + λI)⁻¹(B + μI)) − d",
    range="[0, ∞]",
    best="0",
    reference="James and Stein 1961",
)
def stein_divergence_reverse(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Twice the Kullback-Leibler divergence KL(N(0, B + μI) ‖ N(0, C + λI)), in nats.

    Σ_j (1/ν_j + log ν_j − 1) over the eigenvalues ν of (B + μI)⁻¹(C + λI), summed over all d
    directions. Range [0, ∞], 0 is best; ∞ where either matrix is not positive definite. Curvature
    that B makes up (ν < 1) costs most; `stein_divergence` punishes what B misses.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Exact: determinants from structure, else Cholesky factors.
    Interval: first order, <T_n − C, Q − Q(B + μI)Q> with Q = (C + λI)⁻¹, the approximation held
    fixed.

    Raises: ValueError over the memory budget, naming what to ask instead.
    """
    truth = within_reach(truth, "stein_divergence_reverse")
    added = damping if approximation_damping is None else approximation_damping
    logs = log_determinant(truth, damping), log_determinant(approximation, added)
    if logs[0] is None or logs[1] is None:
        return Estimate(math.inf, n=getattr(truth, "n", 0))
    _, Q = inverses(truth, damping, approximation, added)
    damped = Damped(approximation, added)
    traced = trace_with_inverse(
        truth, damping, Q, damped, trace(approximation) + truth.shape[0] * added
    )
    value = max(traced - logs[1] + logs[0] - truth.shape[0], 0.0)  # rounding below zero
    slope = Difference(Q, Product([Q, damped, Q]))
    return from_influence(truth, value, lambda truth: of_inner(truth, slope), 0.0)
