"""Quality of a step's direction in the exact quadratic model."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms
from ._steps import steps


@metric(
    formula="(g·d)² / (d·(C + λI)d · g·(C + λI)⁻¹g) with d = (B + μI)⁻¹g",
    range="[0, 1]",
    best="1",
    reference="Wu et al. 2024 (arXiv:2406.06420), equation 15",
)
def step_quality(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Decrease of the quadratic model along the step at its best length, over the greatest one.

    (γ(e) / γ(d))² with Wu et al.'s γ(d) = √(d·(C + λI)d) / |g·d| and the exact step
    e = (C + λI)⁻¹ g; 1/(2γ²) is the model's decrease at the best length. Range [0, 1], 1 is best;
    blind to the step's length, unlike `decrease_efficiency`. NaN where C + λI is found not to be
    positive definite: the model has no minimum.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Interval: first order in the truth, g and B held fixed.

    Raises: torch.linalg.LinAlgError for a singular damped matrix.
    """
    added = damping if approximation_damping is None else approximation_damping
    taken, exact, slope, bend, best = found = steps(truth, approximation, damping, gradient, added)
    if not found.sound:
        return Estimate(math.nan, n=getattr(truth, "n", 0))
    value = min((slope**2 / (bend * best)).item(), 1.0)

    def influence(truth: PerExampleTerms) -> Tensor:
        # d best = -e·dC e: less curvature, more to gain
        return value * (of_form(truth, exact, exact) / best - of_form(truth, taken, taken) / bend)

    return from_influence(truth, value, influence, 0.0, 1.0)
