"""First-order influence of single examples on numbers that depend on the truth.

More weight on example n moves C = (1/N) Σ_n T_n towards T_n, and a smooth function of C by its
derivative in the direction T_n - C. The approximation is held fixed.
"""

from torch import Tensor

from ..operators import Operator
from ..truths.per_example import PerExampleTerms


def of_form(truth: PerExampleTerms, u: Tensor, v: Tensor) -> Tensor:
    """Influence of each example on the bilinear form u·C v: u·(T_n - C)v, [N]."""
    return centred(truth.quadratic(u, v))


def of_inner(truth: PerExampleTerms, other: Operator) -> Tensor:
    """Influence of each example on the inner product <C, other>: <T_n - C, other>, [N]."""
    return centred(truth.inners(other))


def centred(each: Tensor) -> Tensor:
    """The numbers [N] less their mean."""
    return each - each.mean()
