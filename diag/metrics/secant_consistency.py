"""Error of the secant equation for the approximation."""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="‖Bs − y‖ / ‖y‖ with y = Cs, s the gradient",
    range="[0, ∞)",
    best="0",
    reference="secant equation: Nocedal and Wright 2006, section 6.1",
)
def secant_consistency(truth: Operator, approximation: Operator, gradient: Tensor) -> Estimate:
    """Relative error of the change of gradient Bs that B predicts for a move s [d]; exact: y = Cs.

    Range [0, ∞), 0 is best: the secant equation of quasi-Newton methods, Bs = y; 1 is no better
    than predicting no change. s is the gradient; any other [d] may be given in its place. (Over
    random s the root mean square is close to `relative_error`.) Nothing is damped: a B with its
    damping inside is for `inverse_secant_consistency`. NaN where y is zero.
    Interval: first order in the truth; none where Bs = y.
    """
    y = truth @ gradient
    missed = y - approximation @ gradient
    length, error = y.norm(), missed.norm()
    value = (error / length).item()

    def influence(truth: PerExampleTerms) -> Tensor:
        grown = value * of_form(truth, y / length, gradient)
        return (of_form(truth, missed / error, gradient) - grown) / length

    return from_influence(truth, value, influence if error else None, 0.0)
