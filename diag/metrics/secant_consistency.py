"""Whether the approximation reproduces the change of the gradient."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.influence import of_form, within
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    "secant_consistency",
    formula="‖Bs − y‖ / ‖y‖ with y = Cs, s the gradient",
    range="[0, ∞)",
    best="0",
    reference="secant equation: Nocedal and Wright 2006, section 6.1",
    needs=("gradient",),
)
def secant_consistency(truth: Operator, approximation: Operator, gradient: Tensor) -> Estimate:
    """Error of the change of gradient that B predicts for a move s [d]; y = Cs is the exact one.

    Range [0, ∞), 0 is best: the secant equation Bs = y, which quasi-Newton methods impose, holds;
    1 is no better than predicting no change. With a Hessian as the truth y is the derivative of
    the gradient along s. s is the gradient, the way steepest descent moves; any other [d] may be
    given in its place. (Over random s the root mean square is close to `relative_error`.)
    Undamped on both sides: B as it is, which for the inverse of a live preconditioner has its
    damping inside; `inverse_secant_consistency` allows for that. NaN where y is zero.
    Interval: first order, from each example's influence on y; none where Bs = y exactly, for a
    norm has no derivative there.
    """
    y = truth @ gradient
    missed = y - approximation @ gradient
    length, error = y.norm(), missed.norm()
    value, n = (error / length).item(), getattr(truth, "n", 0)
    if not isinstance(truth, PerExampleTerms) or not error:
        return Estimate(value, n=n)
    grown = value * of_form(truth, y / length, gradient)
    influence = (of_form(truth, missed / error, gradient) - grown) / length
    return within(from_influence(value, influence, n), 0.0, math.inf)
