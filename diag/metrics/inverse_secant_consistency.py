"""Whether the preconditioner undoes the change of the gradient."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Damped, Operator, solver
from ..registry import metric
from ..statistics.influence import of_form, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "inverse_secant_consistency",
    formula="‖(B + μI)⁻¹y − s‖ / ‖s‖ with y = (C + λI)s, s the gradient",
    range="[0, ∞)",
    best="0",
    reference="secant equation: Nocedal and Wright 2006, section 6.1",
    needs=("damping", "gradient"),
)
def inverse_secant_consistency(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Error of the move s that the preconditioner H = (B + μI)⁻¹ infers from y = (C + λI)s.

    Range [0, ∞), 0 is best: Hy = s, the equation BFGS imposes on H (K-BFGS on each factor). s [d]
    is the gradient; any other direction may be given in its place. Needs products with C and one
    solve with B, so it is exact at any size. NaN where s is zero.
    damping: λ of the truth. approximation_damping: added to B, the same λ unless given; 0 for the
    inverse of a live preconditioner, which has its damping inside.
    Interval: first order, from each example's influence on y; none where Hy = s exactly, for a
    norm has no derivative there.

    Raises: torch.linalg.LinAlgError for a singular damped approximation.
    """
    added = damping if approximation_damping is None else approximation_damping
    precondition = solver(approximation, added)
    missed = precondition(Damped(truth, damping) @ gradient) - gradient
    length, error = gradient.norm(), missed.norm()
    value, n = (error / length).item(), getattr(truth, "n", 0)
    if not isinstance(truth, PerExampleTerms) or not error:
        return Estimate(value, n=n)
    # d‖Hy - s‖ = r·H dC s for the unit vector r along what is missed; H is symmetric
    influence = of_form(truth, precondition(missed / error), gradient) / length
    return within(from_influence(value, influence, n), 0.0, math.inf)
