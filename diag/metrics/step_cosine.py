"""Angle between the step an approximation takes and the exact one."""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Damped, Operator, solve, solver
from ..registry import metric
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "step_cosine",
    formula="cos((B + μI)⁻¹ g, (C + λI)⁻¹ g)",
    range="[−1, 1]",
    best="1",
    reference="Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124), section 5",
    needs=("damping", "gradient"),
)
def step_cosine(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Cosine between the steps for a gradient g [d]: does the error matter for the step taken?

    Range [−1, 1], 1 is best; blind to the step's length. damping: λ of the truth.
    approximation_damping: added to B, the same λ unless given; 0 for the inverse of a live
    preconditioner, which has its damping inside.
    Interval: first order, from each example's influence on the exact step; g and B held fixed.
    How often it holds what it is for: `kronscope.diag.statistics.intervals.from_influence`.

    Raises: torch.linalg.LinAlgError for a singular damped matrix.
    """
    added = damping if approximation_damping is None else approximation_damping
    taken = solve(Damped(approximation, added), gradient)
    undo = solver(truth, damping)
    exact = undo(gradient)
    value = (taken @ exact) / (taken.norm() * exact.norm())
    influence = None
    if isinstance(truth, PerExampleTerms):
        # d cos / d exact, then d exact = -(C + λI)⁻¹ (T_n - C) exact for example n
        slope = taken / (taken.norm() * exact.norm()) - value * exact / exact.square().sum()
        each = truth.quadratic(undo(slope), exact)
        influence = each.mean() - each
    found = from_influence(value.clamp(-1, 1).item(), influence, getattr(truth, "n", 0))
    return Estimate(found.value, max(found.low, -1.0), min(found.high, 1.0), found.n)
