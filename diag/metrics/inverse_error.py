"""Relative error of the damped inverse in the Frobenius norm."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Dense, Operator, dense
from ..operators.compositions import Difference, Product
from ..registry import metric
from ..spectra.pencils import inverse_moment, inverses, trace_with_inverse, within_reach
from ..statistics.influence import of_inner
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="‖(B + μI)⁻¹ − (C + λI)⁻¹‖_F / ‖(C + λI)⁻¹‖_F",
    range="[0, ∞)",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
)
def inverse_error(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Relative Frobenius error of the damped inverse, the matrix that multiplies the gradient.

    ‖P − Q‖_F / ‖Q‖_F with P = (B + μI)⁻¹, Q = (C + λI)⁻¹. Range [0, ∞), 0 is best. Directions of
    little curvature weigh most.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Exact: from dense inverses, for a truth of few columns from their r x r Gram matrix (to 1e-8,
    as the root of a difference).
    Interval: first order, <T_n − C, Q(P − Q)Q> and <T_n − C, Q³>, the approximation held fixed;
    none where P = Q.

    Raises: ValueError over the memory budget, naming what to ask instead;
    torch.linalg.LinAlgError for a singular damped matrix.
    """
    truth = within_reach(truth, "inverse_error")
    added = damping if approximation_damping is None else approximation_damping
    P, Q = inverses(truth, damping, approximation, added)
    own = inverse_moment(truth, damping, Q, 2)
    if isinstance(P, Dense):
        square = (dense(P) - dense(Q)).square().sum().item()
    else:
        cross = trace_with_inverse(truth, damping, Q, P, inverse_moment(approximation, added, P, 1))
        square = inverse_moment(approximation, added, P, 2) - 2 * cross + own
    value = math.sqrt(max(square, 0.0) / own)

    def influence(truth: PerExampleTerms) -> Tensor:
        slope = Product([Q, Difference(P, Q, 1 - value**2), Q])  # of value, times value · ‖Q‖²
        return of_inner(truth, slope) / (value * own)

    return from_influence(truth, value, influence if value else None, 0.0)
