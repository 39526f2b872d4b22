"""Shampoo: a Kronecker product of roots of a gradient's second moments, and its square."""

from torch import Tensor

from ..operators import KroneckerSum
from ..problem import Block, Problem
from ..registry import approximation
from ._variables import per_variable, power, variables


@approximation(reference="Gupta, Koren and Singer 2018 (arXiv:1802.09568), algorithms 1 and 2")
def shampoo(
    problem: Problem, block: Block, of: str = "empirical_fisher", batch: int = 1
) -> KroneckerSum:
    """Matrix whose inverse Shampoo applies: one root of a second moment per axis.

    W: L^¼ ⊗ R^¼ with L = E[ĝ ĝᵀ] [out, out], R = E[ĝᵀ ĝ] [in, in];  b: E[ĝ ĝᵀ]^½ [out, out]

    ĝ is the mean gradient of a minibatch of `batch` examples, the expectation a mean over the
    problem's minibatches (of "ggn", "fisher": exact, with zero-mean gradients). A convolution's
    weight has three axes (O, I, kh·kw) and exponents 1/6. Undamped; zero between weight and bias.

    It approximates a SQUARE ROOT: its square L^½ ⊗ R^½ stands for E[vec ĝ vec ĝᵀ], which is
    (F + (batch − 1) ∇∇ᵀ) / batch for the empirical Fisher F and random minibatches, and F / batch
    for gradients of mean zero. Errors against F compare different units; those of
    `shampoo_squared` and of metrics blind to scale do not.

    Raises: ValueError for a block that is no Linear layer or convolution, of="hessian", a batch
    that does not divide the number of examples.
    """

    def roots(axes: tuple[Tensor, ...]) -> list[Tensor]:
        return [power(H, 1 / (2 * len(axes))) for H in axes]

    found = variables(problem, block, of, batch, "shampoo")
    return per_variable(found, roots, found[-1].columns.stop)


@approximation(reference="Morwani et al. 2024 (arXiv:2406.17748)")
def shampoo_squared(
    problem: Problem, block: Block, of: str = "empirical_fisher", batch: int = 1
) -> KroneckerSum:
    """Shampoo's factors without their roots, an approximation of the Fisher itself.

    W: batch · L ⊗ R / tr L with L = E[ĝ ĝᵀ] [out, out], R = E[ĝᵀ ĝ] [in, in];  b: batch · E[ĝ ĝᵀ]

    One step from the identity of the power iteration to the best Kronecker product of
    batch · E[vec ĝ vec ĝᵀ] (the truth `of` for batch = 1), with its trace. ĝ as in `shampoo`. A
    convolution's weight is the matrix [O, I·kh·kw]. Zero between weight and bias; without a bias
    and with batch = 1 this is `tkfac`.

    Raises: ValueError for a block that is no Linear layer or convolution, of="hessian", a batch
    that does not divide the number of examples.
    """

    def factors(axes: tuple[Tensor, ...]) -> list[Tensor]:
        return trace_matched(axes, batch)

    found = variables(problem, block, of, batch, "shampoo_squared", flat=True)
    return per_variable(found, factors, found[-1].columns.stop)


def trace_matched(axes: tuple[Tensor, ...], batch: int) -> list[Tensor]:
    """Factors of batch · (H_1 ⊗ ... ⊗ H_k) / T^{k−1}, T the trace all H_i have in common."""
    first, *others = axes
    total = first.trace()
    return [batch * first, *(H / total if total else H for H in others)]  # zeros stay zeros
