"""TNT: the covariance of a tensor-normal gradient."""

from torch import Tensor

from ..operators import KroneckerSum
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ._variables import per_variable, variables


@approximation(
    "tnt",
    of="fisher",
    kind="curvature",
    reference="Ren and Goldfarb 2021 (arXiv:2106.02925)",
)
def tnt(problem: Problem, block: Block, of: str = "fisher", batch: int = 1) -> KroneckerSum:
    """Model each variable's sampled-label gradient as tensor normal: covariance U_1 ⊗ ... ⊗ U_k.

    U_i = H_i / (c^{k−1} Π_{j≠i} n_j),  c = (T / Π_j n_j)^{1/k},  times batch

    H_i [n_i, n_i] is the second moment of ĝ contracted over all axes but i, T the trace they have
    in common; ĝ the mean gradient of a minibatch of `batch` examples. All U_i have mean eigenvalue
    c, and tr(⊗ U_i) = T. The labels are the model's, so that E[vec ĝ vec ĝᵀ] is F / batch: the
    factor batch brings the product back to the Fisher's scale. Axes: weight (out, in),
    convolution (O, I, kh·kw), bias (out); weight and bias are separate, the block between them is
    zero. Undamped (the optimizer adds εI to each U_i before that factor).

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
    sizes, k = [len(H) for H in axes], len(axes)
    entries = 1
    for size in sizes:
        entries *= size
    c = (total / entries) ** (1 / k)
    return [H / (c ** (k - 1) * (entries // len(H))) for H in axes]
