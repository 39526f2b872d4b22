"""Condition number of the preconditioned truth."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..spectra.preconditioned import NotPositiveDefiniteError, preconditioned_extremes, square_root
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="λ_max / λ_min of (B + μI)^−½ (C + λI) (B + μI)^−½",
    range="[1, ∞]",
    best="1",
    reference="Saad 2003, section 9.2",
)
def preconditioned_condition(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Condition number of the preconditioned truth, 1 if B + μI is C + λI up to scale.

    It bounds the convergence of gradient descent preconditioned with B. Range [1, ∞], 1 is best;
    ∞ where C + λI or B + μI is not positive definite.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Interval: first order, from the two extreme eigenvalues' derivatives x·(T_n - C)x, B held
    fixed.
    """
    added = damping if approximation_damping is None else approximation_damping
    try:
        root = square_root(approximation, added)
        least, greatest = preconditioned_extremes(truth, damping, root)
    except NotPositiveDefiniteError:
        return Estimate(math.inf, n=getattr(truth, "n", 0))
    condition = greatest.value / least.value

    def influence(truth: PerExampleTerms) -> Tensor:
        high, low = (of_form(truth, pair.x, pair.x) / pair.value for pair in (greatest, least))
        return condition * (high - low)

    return from_influence(truth, condition, influence, least=1.0, log=True)
