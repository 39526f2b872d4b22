"""Error of the secant equation for the preconditioner."""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Damped, Operator, solver
from ..registry import metric
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="‖(B + μI)⁻¹y − s‖ / ‖s‖ with y = (C + λI)s, s the gradient",
    range="[0, ∞)",
    best="0",
    reference="secant equation: Nocedal and Wright 2006, section 6.1",
)
def inverse_secant_consistency(
    truth: Operator,
    approximation: Operator,
    damping: float,
    gradient: Tensor,
    approximation_damping: float | None = None,
) -> Estimate:
    """Relative error of the move s that H = (B + μI)⁻¹ infers from the change y = (C + λI)s.

    Range [0, ∞), 0 is best: Hy = s, the equation BFGS imposes on H (K-BFGS on each factor). s [d]
    is the gradient; any other direction may be given in its place. Exact at any size. NaN where s
    is zero.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Interval: first order in the truth; none where Hy = s.

    Raises: torch.linalg.LinAlgError for a singular damped approximation.
    """
    added = damping if approximation_damping is None else approximation_damping
    precondition = solver(approximation, added)
    missed = precondition(Damped(truth, damping) @ gradient) - gradient
    length, error = gradient.norm(), missed.norm()

    def influence(truth: PerExampleTerms) -> Tensor:
        # d‖Hy - s‖ = r·H dC s for the unit vector r along what is missed; H is symmetric
        return of_form(truth, precondition(missed / error), gradient) / length

    return from_influence(truth, (error / length).item(), influence if error else None, 0.0)
