"""The truths: exact Hessian, GGN and Fisher blocks.

A Linear layer that sees one row per example is given as a SampleMean (per-example sums); any other
block as a Dense matrix from d forward-over-reverse products of torch.func.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diag import crosscheck
from diag.blocks import Block
from diag.curvatures import dense_block, layer_curvature
from diag.operators import Dense, Operator
from diag.problem import Problem
from diag.rows import layer_rows
from diag.sample_mean import SampleMean

BACKENDS = ("torch.func", "backpack")


def hessian(problem: Problem, block: Block) -> Operator:
    """Hessian block of the batch-mean loss, mean_n ∂²ℓ_n/∂θ∂θᵀ.

    Returns: [d, d] in row-major order of [W, b]; symmetric, may be indefinite.
    Source: for Linear layers algorithm-free: z = W_bar a is linear in W_bar, so the block is
    mean_n (∂²ℓ_n/∂z²) ⊗ a_n a_nᵀ (Botev et al. 2017, equation 6).

    Squared error of one linear unit, mean of 2 a aᵀ over a = [1, 1] and [3, 1]:
        >>> from torch import nn, tensor, zeros
        >>> from diag.operators import dense
        >>> problem = Problem(nn.Sequential(nn.Linear(1, 1)), nn.MSELoss(),
        ...                   tensor([[1.0], [3.0]]), zeros(2, 1))
        >>> dense(hessian(problem, problem.block("0"))).tolist()
        [[10.0, 4.0], [4.0, 2.0]]
    """
    return _truth(problem, block, "hessian")


def ggn(problem: Problem, block: Block, backend: str = "torch.func") -> Operator:
    """Generalised Gauss-Newton block of the batch-mean loss, mean_n J_nᵀ H_n J_n.

    J_n [c, d] is the Jacobian of the outputs w.r.t. the block, H_n [c, c] the Hessian of example
    n's loss w.r.t. the outputs. backend="backpack" computes it with BackPACK's SqrtGGNExact.

    Returns: [d, d] in row-major order of [W, b]; positive semi-definite for a convex loss.
    Raises: ValueError for an unknown backend or a module BackPACK does not support.
    Source: Schraudolph 2002, section 3.
    """
    if backend not in BACKENDS:
        raise ValueError(f"no backend '{backend}'; known: {list(BACKENDS)}")
    if backend == "backpack":
        return crosscheck.ggn(problem, block)
    return _truth(problem, block, "ggn")


def fisher(problem: Problem, block: Block) -> Operator:
    """Fisher block, mean_n E_{t ~ model}[g g^T], the expectation over labels taken exactly.

    In the unit of the loss: for a loss s · (-log p) it is s times the Fisher information.

    Returns: [d, d] in row-major order of [W, b]; positive semi-definite.
    Raises: ValueError when the loss belongs to no known likelihood.
    Source: Martens 2020 (arXiv:1412.1193), section 5.
    """
    return _truth(problem, block, "fisher")


def fisher_mc(
    problem: Problem, block: Block, samples: int = 1, generator: torch.Generator | None = None
) -> Operator:
    """Monte-Carlo Fisher block, mean over `samples` labels drawn per example of g gᵀ.

    generator: for the labels; None takes a new one seeded with 0, so that results repeat and the
    global random state is left alone.

    Returns: [d, d] in row-major order of [W, b]; its expectation is `fisher`.
    Raises: ValueError for samples < 1 or a loss that belongs to no known likelihood.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if generator is None:
        generator = torch.Generator(problem.inputs.device).manual_seed(0)
    return _compute(problem, block, "fisher_mc", samples, generator)


def empirical_fisher(problem: Problem, block: Block) -> Operator:
    """Second moment of the data's own gradients, mean_n g_n g_nᵀ; not the Fisher.

    Returns: [d, d] in row-major order of [W, b]; positive semi-definite, rank at most n.
    Source: Kunstner et al. 2019 (arXiv:1905.12558), equation 3.
    """
    return _truth(problem, block, "empirical_fisher")


TRUTHS: dict[str, Callable[[Problem, Block], Operator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "fisher_mc": fisher_mc,
    "empirical_fisher": empirical_fisher,
}


def truth(problem: Problem, block: Block, of: str) -> Operator:
    """Return the truth named `of`. Raises: ValueError listing the known names."""
    if of not in TRUTHS:
        raise ValueError(f"no truth '{of}'; known: {list(TRUTHS)}")
    return TRUTHS[of](problem, block)


def _truth(problem: Problem, block: Block, of: str) -> Operator:
    rows = layer_rows(problem, block)
    if rows is None:
        size = 8 * block.d**2
    else:
        size = 8 * len(rows.a) * (rows.left_size**2 + rows.a.shape[1])
    return problem.remember((of, block), lambda: _compute(problem, block, of), size)


def _compute(
    problem: Problem,
    block: Block,
    of: str,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Operator:
    rows = layer_rows(problem, block)
    if rows is None:
        matrix = dense_block(problem, block, of, samples, generator)
        return Dense(_symmetric(matrix), problem.n)
    C = layer_curvature(problem, rows.module, of, samples, generator)
    return SampleMean(rows.a, _symmetric(C[:, rows.outputs, rows.outputs]))


def _symmetric(matrix: Tensor) -> Tensor:
    """Both triangles agree up to rounding; averaging makes them equal. A truth has no gradient."""
    return ((matrix + matrix.mT) / 2).detach().contiguous()
