"""How much of the possible decrease of the model the step takes."""

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
    "decrease_efficiency",
    formula="(g·d − ½ d·(C + λI)d) / (½ g·(C + λI)⁻¹g) with d = (B + μI)⁻¹g",
    range="(−∞, 1]",
    best="1",
    reference="Nocedal and Wright 2006, chapter 4 (model decrease)",
    needs=("damping", "gradient"),
)
def decrease_efficiency(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Decrease of the model by the step AS TAKEN, as a share of the greatest there is.

    Unlike `step_quality` it judges direction and length together: a step twice too long along the
    best direction scores 0, a longer one below 0 (the model rises); no learning rate is applied.
    Range (−∞, 1], 1 is best. NaN where C + λI shows on these steps that it is not positive
    definite: such a model has no minimum.
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
    value = min(((2 * slope - bend) / best).item(), 1.0)
    influence = None
    if isinstance(truth, PerExampleTerms):
        # d best = -e·dC e: less curvature, more to gain
        grown = value * of_form(truth, exact, exact)
        influence = (grown - of_form(truth, taken, taken)) / best
    return within(from_influence(value, influence, n), -math.inf, 1.0)
