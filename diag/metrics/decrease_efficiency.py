"""Share of the greatest decrease of the quadratic model that the step achieves."""

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
    formula="(g·d − ½ d·(C + λI)d) / (½ g·(C + λI)⁻¹g) with d = (B + μI)⁻¹g",
    range="(−∞, 1]",
    best="1",
    reference="Nocedal and Wright 2006, chapter 4 (model decrease)",
)
def decrease_efficiency(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Decrease of the quadratic model by the whole step d, over the greatest possible.

    Judges direction and length, without a learning rate: a step twice too long along the best
    direction scores 0, a longer one below 0. Range (−∞, 1], 1 is best. NaN where C + λI is found
    not to be positive definite: the model has no minimum.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Interval: first order in the truth, g and B held fixed.

    Raises: torch.linalg.LinAlgError for a singular damped matrix.
    """
    added = damping if approximation_damping is None else approximation_damping
    taken, exact, slope, bend, best = found = steps(truth, approximation, damping, gradient, added)
    if not found.sound:
        return Estimate(math.nan, n=getattr(truth, "n", 0))
    value = min(((2 * slope - bend) / best).item(), 1.0)

    def influence(truth: PerExampleTerms) -> Tensor:
        # d best = -e·dC e: less curvature, more to gain
        grown = value * of_form(truth, exact, exact)
        return (grown - of_form(truth, taken, taken)) / best

    return from_influence(truth, value, influence, greatest=1.0)
