"""Quality of a step's direction in the exact quadratic model."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.influence import of_form, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms
from ._steps import steps


@metric(
    "step_quality",
    formula="(g·d)² / (d·(C + λI)d · g·(C + λI)⁻¹g) with d = (B + μI)⁻¹g",
    range="[0, 1]",
    best="1",
    reference="Wu et al. 2024 (arXiv:2406.06420), equation 15",
    needs=("damping", "gradient"),
)
def step_quality(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Decrease of the model along the step at its best length, as a share of the greatest there is.

    Wu et al. judge a step by γ(d) = √(d·Cd) / |g·d|, the smaller the better; 1/(2γ²) is what the
    model decreases by at the best length. This is (γ(e) / γ(d))² with the exact step
    e = (C + λI)⁻¹ g and the damped C: the same order of steps, in units of what can be reached.
    Range [0, 1], 1 is best; blind to the step's length, as `decrease_efficiency` is not. NaN where
    C + λI shows on these steps that it is not positive definite: such a model has no minimum.
    damping: λ of the truth. approximation_damping: added to B, the same λ unless given; 0 for the
    inverse of a live preconditioner, which has its damping inside.
    Interval: first order, from each example's influence on d·Cd and on the exact step; g and B
    held fixed.

    Raises: torch.linalg.LinAlgError for a singular damped matrix.
    """
    added = damping if approximation_damping is None else approximation_damping
    taken, exact, slope, bend, best = found = steps(truth, approximation, damping, gradient, added)
    n = getattr(truth, "n", 0)
    if not found.sound:
        return Estimate(math.nan, n=n)
    value = min((slope**2 / (bend * best)).item(), 1.0)
    influence = None
    if isinstance(truth, PerExampleTerms):
        # d best = -e·dC e: less curvature, more to gain
        influence = of_form(truth, exact, exact) / best - of_form(truth, taken, taken) / bend
        influence = value * influence
    return within(from_influence(value, influence, n), 0.0, 1.0)
