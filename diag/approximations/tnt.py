"""TNT: the covariance of a tensor-normal model of the gradient."""

from math import prod

from torch import Tensor

from ..operators import KroneckerSum
from ..problem import Block, Problem
from ..registry import approximation
from ._variables import per_variable, variables


@approximation(reference="Ren and Goldfarb 2021 (arXiv:2106.02925)")
def tnt(problem: Problem, block: Block, of: str = "fisher", batch: int = 1) -> KroneckerSum:
    """Covariance U_1 ⊗ ... ⊗ U_k of each variable's gradient, modelled as tensor normal.

    U_i = H_i / (c^{k−1} Π_{j≠i} n_j),  c = (T / Π_j n_j)^{1/k},  times batch

    H_i [n_i, n_i] is the second moment of ĝ contracted over all axes but i, T their common trace,
    ĝ the mean gradient of a minibatch of `batch` examples. All U_i have mean eigenvalue c, and
    tr(⊗ U_i) = T. With the model's labels E[vec ĝ vec ĝᵀ] is F / batch: the factor batch brings
    the product to the Fisher's scale. Axes: weight (out, in), convolution (O, I, kh·kw), bias
    (out); zero between weight and bias. Undamped (the optimizer adds εI to each U_i before that
    factor).

    of: "fisher" takes the expectation over labels exactly, "fisher_mc" draws one per example.

    Raises: ValueError for a block that is no Linear layer or convolution, of="hessian", a batch
    that does not divide the number of examples.
    """

    def factors(axes: tuple[Tensor, ...]) -> list[Tensor]:
        first, *others = _same_average(axes)
        return [batch * first, *others]

    found = variables(problem, block, of, batch, "tnt")
    return per_variable(found, factors, found[-1].columns.stop)


def _same_average(axes: tuple[Tensor, ...]) -> list[Tensor]:
    """U_i, each with the mean eigenvalue c; zeros for a gradient that is zero."""
    total = axes[0].trace()
    if total == 0:
        return list(axes)
    k, entries = len(axes), prod(len(H) for H in axes)
    c = (total / entries) ** (1 / k)
    return [H / (c ** (k - 1) * (entries // len(H))) for H in axes]
