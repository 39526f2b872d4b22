"""Actual over predicted decrease of the loss."""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Damped, Operator, solve
from ..problem import Block, Problem
from ..registry import metric
from ..statistics.influence import centred
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms
from ._steps import example_decreases, example_slopes


@metric(
    formula="(f(θ) − f(θ − d)) / (g·d − ½ d·Cd) with d = (B + μI)⁻¹g",
    range="(−∞, ∞)",
    best="1",
    reference="Nocedal and Wright 2006, equation 4.4",
)
def rho(
    truth: Operator,
    approximation: Operator,
    damping: float,
    problem: Problem,
    block: Block,
    approximation_damping: float | None = None,
) -> Estimate:
    """Decrease of the loss by the approximation's step over that of the exact quadratic model.

    f is the loss on the problem's batch, g its gradient with respect to the block, d the whole
    step without a learning rate; the other blocks stay. Range (−∞, ∞), around 1 is best (exactly 1
    for a loss quadratic in the block and its Hessian as the truth); below 0 one rises and the other
    falls. The model is that of the loss, WITHOUT λ, which Levenberg-Marquardt rules may count in.
    damping: μ unless approximation_damping is given, which is 0 where B has its damping inside.
    Interval: first order in the ratio of two means over examples, of ℓ_n(θ) − ℓ_n(θ − d) and of
    g_n·d − ½ d·T_n d, with the step held fixed.

    Raises: torch.linalg.LinAlgError for a singular damped approximation.
    """
    added = damping if approximation_damping is None else approximation_damping
    gradient = problem.gradient(block)
    step = solve(Damped(approximation, added), gradient)
    actual = example_decreases(problem, block, step)
    predicted = gradient @ step - step @ (truth @ step) / 2
    value = (actual.mean() / predicted).item()

    def influence(truth: PerExampleTerms) -> Tensor:
        expected = example_slopes(problem, block, step) - truth.quadratic(step, step) / 2
        return centred(actual - value * expected) / predicted

    return from_influence(truth, value, influence)
