"""First-order influence of single examples: what a number gains when the truth takes one more.

C = (1/N) Σ_n T_n; giving example n a little more weight moves C towards T_n, and a smooth function
of C by its derivative in the direction T_n - C. All that follows holds the approximation fixed.
"""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..truths.per_example import PerExampleTerms


def of_form(truth: PerExampleTerms, u: Tensor, v: Tensor) -> Tensor:
    """Influence on the bilinear form u·C v: u·(T_n - C)v for every example, [N]."""
    return centred(truth.quadratic(u, v))


def of_inner(truth: PerExampleTerms, other: Operator) -> Tensor:
    """Influence on the inner product <C, other>: <T_n - C, other> for every example, [N]."""
    return centred(truth.inners(other))


def centred(each: Tensor) -> Tensor:
    """The numbers [N] less their mean."""
    return each - each.mean()


def within(found: Estimate, least: float, greatest: float) -> Estimate:
    """The estimate with its interval cut to [least, greatest], a metric's range; NaN ends stay."""
    # NaN as the first argument: max and min return it, for no comparison with it holds
    return Estimate(found.value, max(found.low, least), min(found.high, greatest), found.n)
