"""Relative error of the inverse."""

import math

from ..estimate import Estimate
from ..operators import Dense, Operator, dense
from ..operators.compositions import Difference, Product
from ..registry import metric
from ..spectra.pencils import inverse_moment, inverses, trace_with_inverse, within_reach
from ..statistics.influence import of_inner, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "inverse_error",
    formula="‖(B + μI)⁻¹ − (C + λI)⁻¹‖_F / ‖(C + λI)⁻¹‖_F",
    range="[0, ∞)",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
    needs=("damping",),
)
def inverse_error(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Relative Frobenius error of the damped inverse, the matrix that multiplies the gradient.

    ‖P − Q‖_F / ‖Q‖_F with P = (B + μI)⁻¹, Q = (C + λI)⁻¹. Range [0, ∞), 0 is best. Directions of
    little curvature weigh most: with many of them the value says how well B knows what is flat.
    damping: λ of the truth. approximation_damping: added to B, the same λ unless given; 0 for the
    inverse of a live preconditioner, which has its damping inside.
    Exact: from dense inverses, for a truth of few columns from their r x r Gram matrix (then to
    1e-8 of the value's unit, as the root of a difference).
    Interval: first order, <T_n − C, Q(P − Q)Q> and <T_n − C, Q³>, the approximation held fixed;
    none where P − Q is zero, for a norm has no derivative there.

    Raises: ValueError over the memory budget, naming what to ask instead;
    torch.linalg.LinAlgError for a singular damped matrix.
    """
    truth = within_reach(truth, "inverse_error")
    added = damping if approximation_damping is None else approximation_damping
    P, Q = inverses(truth, damping, approximation, added)
    own, n = inverse_moment(truth, damping, Q, 2), getattr(truth, "n", 0)
    if isinstance(P, Dense):
        square = (dense(P) - dense(Q)).square().sum().item()
    else:
        cross = trace_with_inverse(truth, damping, Q, P, inverse_moment(approximation, added, P, 1))
        square = inverse_moment(approximation, added, P, 2) - 2 * cross + own
    value = math.sqrt(max(square, 0.0) / own)
    if not isinstance(truth, PerExampleTerms) or not value:
        return Estimate(value, n=n)
    slope = Product([Q, Difference(P, Q, 1 - value**2), Q])  # of value, times value · ‖Q‖²
    influence = of_inner(truth, slope) / (value * own)
    return within(from_influence(value, influence, n), 0.0, math.inf)
