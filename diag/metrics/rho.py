"""Actual over predicted decrease of the loss."""

from ..estimate import Estimate
from ..operators import Damped, Operator, solve
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import metric
from ..statistics.influence import centred
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms
from ._steps import example_decreases, example_slopes


@metric(
    "rho",
    formula="(f(θ) − f(θ − d)) / (g·d − ½ d·Cd) with d = (B + μI)⁻¹g",
    range="(−∞, ∞)",
    best="1",
    reference="Nocedal and Wright 2006, equation 4.4",
    needs=("damping", "problem", "block"),
)
def rho(
    truth: Operator,
    approximation: Operator,
    damping: float,
    problem: Problem,
    block: Block,
    approximation_damping: float | None = None,
) -> Estimate:
    """How far the exact quadratic model can be trusted for the step the approximation takes.

    f is the loss on the problem's batch, g its gradient with respect to the block, d the whole
    step without a learning rate; the other blocks stay. Around 1 is best (exactly 1 for a loss
    quadratic in the block and its Hessian as the truth); range (−∞, ∞), below 0 the loss rises
    where the model falls, or the other way round.
    The predicted decrease is that of the loss itself, WITHOUT λ: accounts differ (a
    Levenberg-Marquardt rule may count ½λ‖d‖² in), but damping is a caution about the step and no
    claim about the loss.
    damping: λ, added to B unless approximation_damping is given; 0 for the inverse of a live
    preconditioner, which has its damping inside.
    Interval: first order in the ratio of two means over examples, of ℓ_n(θ) − ℓ_n(θ − d) and of
    g_n·d − ½ d·T_n d, with the step held fixed; for truths made of per-example terms.

    Raises: torch.linalg.LinAlgError for a singular damped approximation.
    """
    added = damping if approximation_damping is None else approximation_damping
    gradient = problem.gradient(block)
    step = solve(Damped(approximation, added), gradient)
    actual = example_decreases(problem, block, step)
    predicted = gradient @ step - step @ (truth @ step) / 2
    value = (actual.mean() / predicted).item()
    influence = None
    if isinstance(truth, PerExampleTerms):
        expected = example_slopes(problem, block, step) - truth.quadratic(step, step) / 2
        influence = centred(actual - value * expected) / predicted
    return from_influence(value, influence, getattr(truth, "n", 0))
