"""Cosine between the step of an approximation and the exact step."""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Damped, Operator, solve, solver
from ..registry import metric
from ..statistics.influence import centred
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="cos((B + μI)⁻¹ g, (C + λI)⁻¹ g)",
    range="[−1, 1]",
    best="1",
    reference="Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124), section 5",
)
def step_cosine(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Cosine between the steps that approximation and truth give for a gradient g [d].

    Range [−1, 1], 1 is best; blind to the step's length.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Interval: first order in the truth, g and B held fixed; its coverage:
    `kronscope.diag.statistics.intervals.from_influence`.

    Raises: torch.linalg.LinAlgError for a singular damped matrix.
    """
    added = damping if approximation_damping is None else approximation_damping
    taken = solve(Damped(approximation, added), gradient)
    undo = solver(truth, damping)
    exact = undo(gradient)
    size = taken.norm() * exact.norm()
    value = (taken @ exact) / size

    def influence(truth: PerExampleTerms) -> Tensor:
        # d cos / d exact, then d exact = -(C + λI)⁻¹ (T_n - C) exact for example n
        slope = taken / size - value * exact / exact.square().sum()
        return -centred(truth.quadratic(undo(slope), exact))

    return from_influence(truth, value.clamp(-1, 1).item(), influence, -1.0, 1.0)
