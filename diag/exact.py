"""Exact Hessian, GGN and Fisher blocks: the truths that approximations are compared with.

A Linear layer that sees one row per example has KroneckerTerms, C = mean C_n ⊗ a_n a_nᵀ. The GGN
and the Fishers of any other block have LowRankTerms, C = mean V_n V_nᵀ. What has neither form (the
Hessian of a layer with shared weights, a loss that is not convex in the outputs) or does not fit
the budget in it is a Dense matrix for small d, and MatrixFree above.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from .backpack import quantities
from .backward.loss_roots import loss_roots
from .backward.products import block_products, dense_block, layer_curvature
from .operators import Dense, Operator
from .operators.batched import Diagonals, Outer, Packed
from .problem import Block, Problem
from .truths.assembly import assembled, by_rows, layer_inputs, size_in_bytes
from .truths.kronecker_terms import KroneckerTerms
from .truths.matrix_free import MatrixFree

BACKENDS = ("torch.func", "backpack")
DENSE_UP_TO = 5000  # parameters; above, a block without per-example terms stays matrix-free


def hessian(problem: Problem, block: Block) -> Operator:
    """Hessian block of the batch-mean loss, mean_n ∂²ℓ_n/∂θ∂θᵀ.

    Returns: [d, d] in row-major order of [W, b]; symmetric, may be indefinite.
    Source: for Linear layers mean_n (∂²ℓ_n/∂z²) ⊗ a_n a_nᵀ (Botev et al. 2017, equation 6).

    Squared error of one linear unit, mean of 2 a aᵀ over a = [1, 1] and [3, 1]:
        >>> from torch import nn, tensor, zeros
        >>> from kronscope.diag.operators import dense
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
    if by_backpack(backend):
        return quantities.ggn(problem, block)
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
    problem: Problem,
    block: Block,
    samples: int = 1,
    generator: torch.Generator | None = None,
    backend: str = "torch.func",
) -> Operator:
    """Monte-Carlo Fisher block, mean over `samples` labels drawn per example of g gᵀ.

    generator: for the labels; None takes a new one seeded with 0. backend="backpack" computes it
    with BackPACK's SqrtGGNMC, which draws other labels from the same generator.

    Returns: [d, d] in row-major order of [W, b]; its expectation is `fisher`.
    Raises: ValueError for samples < 1, a loss that belongs to no known likelihood, an unknown
    backend or a module BackPACK does not support.
    """
    if by_backpack(backend):
        return quantities.fisher_mc(problem, block, samples, generator)
    if samples < 1:
        raise ValueError(f"samples must be at least 1, not {samples}")
    if generator is None:
        generator = torch.Generator(problem.inputs.device).manual_seed(0)
    return _compute(problem, block, "fisher_mc", samples, generator)


def empirical_fisher(problem: Problem, block: Block, backend: str = "torch.func") -> Operator:
    """Second moment of the data's own gradients, mean_n g_n g_nᵀ; not the Fisher.

    backend="backpack" computes it with BackPACK's BatchGrad.

    Returns: [d, d] in row-major order of [W, b]; positive semi-definite, rank at most n.
    Raises: ValueError for an unknown backend or a module BackPACK does not support.
    Source: Kunstner et al. 2019 (arXiv:1905.12558), equation 3.
    """
    if by_backpack(backend):
        return quantities.empirical_fisher(problem, block)
    return _truth(problem, block, "empirical_fisher")


TRUTHS: dict[str, Callable[[Problem, Block], Operator]] = {
    "hessian": hessian,
    "ggn": ggn,
    "fisher": fisher,
    "fisher_mc": fisher_mc,
    "empirical_fisher": empirical_fisher,
}


def truth(problem: Problem, block: Block, of: str) -> Operator:
    """Exact block of the truth named `of`. Raises: ValueError listing the known names."""
    _check(of)
    return TRUTHS[of](problem, block)


def truths(problem: Problem, blocks: Sequence[Block], of: str) -> Iterator[tuple[Block, Operator]]:
    """Each block with its truth, from few passes through the network.

    One pass for as many blocks as fit half the problem's budget.

    Raises: ValueError for an unknown name.
    """
    _check(of)
    roots = None if of in ("hessian", "fisher_mc") else _roots(problem, of)
    if roots is None:
        yield from ((block, truth(problem, block, of)) for block in blocks)
        return
    waiting = list(blocks)
    while waiting:
        bundle, room = [waiting.pop(0)], problem.budget / 2
        room -= size_in_bytes(problem, bundle[0], roots)
        while waiting and (room := room - size_in_bytes(problem, waiting[0], roots)) > 0:
            bundle.append(waiting.pop(0))
        fitting = [b for b in bundle if size_in_bytes(problem, b, roots) <= problem.budget / 2]
        found = assembled(problem, fitting, roots)
        for block in bundle:
            if block in found:  # where approximations built from this truth will look for it
                problem.remember((of, block), partial(found.pop, block), _held)
            yield block, truth(problem, block, of)


def by_backpack(backend: str) -> bool:
    """Whether BackPACK is asked for. Raises: ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"no backend '{backend}'; known: {list(BACKENDS)}")
    return backend == "backpack"


def _check(of: str) -> None:
    if of not in TRUTHS:
        raise ValueError(f"no truth '{of}'; known: {list(TRUTHS)}")


def _truth(problem: Problem, block: Block, of: str) -> Operator:
    return problem.remember((of, block), lambda: _compute(problem, block, of), _held)


def _held(operator: Operator) -> int:
    """Bytes of the tensors an operator is made of."""
    parts = [*vars(operator).values(), *vars(getattr(operator, "left", operator)).values()]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _roots(
    problem: Problem, of: str, samples: int = 1, generator: torch.Generator | None = None
) -> Diagonals | Outer | None:
    if of == "fisher_mc":  # other labels each time
        return loss_roots(problem, of, samples, generator)
    return problem.remember(("roots", of), lambda: loss_roots(problem, of), 0)


def _compute(
    problem: Problem,
    block: Block,
    of: str,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Operator:
    roots = None if of == "hessian" else _roots(problem, of, samples, generator)
    if roots is not None and size_in_bytes(problem, block, roots) <= problem.budget / 2:
        return assembled(problem, [block], roots)[block]
    layer = by_rows(problem, block)
    if layer is not None and (roots is None or of in ("ggn", "fisher")):
        return _by_examples(problem, block, of, layer.shape[0])
    return _whole(problem, block, of, samples, generator)


def _by_examples(problem: Problem, block: Block, of: str, out: int) -> Operator:
    """Truth of a Linear layer from each example's curvature at the pre-activation."""
    member, (o, _) = block.members[0], block.members[0].matrix_shape
    each = problem.inputs.element_size()
    size = each * problem.n * (out**2 + o**2)
    if size > problem.budget:
        raise ValueError(
            f"the curvatures of {problem.n} examples at the {out} outputs of '{member.module}' "
            f"take {size / 2**30:.1f} GiB, over the budget of {problem.budget / 2**30:.1f} GiB; "
            f"give Problem fewer examples, dtype=torch.float32 or a larger budget="
        )
    rows = slice(*member.rows) if member.rows else slice(None)
    C = layer_curvature(problem, member.module, of)
    return KroneckerTerms(layer_inputs(problem, member), Packed.of(_symmetric(C[:, rows, rows])))


def _whole(
    problem: Problem, block: Block, of: str, samples: int, generator: torch.Generator | None
) -> Operator:
    """Truth as a dense matrix for small d, by its products above."""
    parameter = problem.model.get_parameter(block.parameters[0])
    if block.d <= DENSE_UP_TO and parameter.element_size() * block.d**2 <= problem.budget / 4:
        matrix = dense_block(problem, block, of, samples, generator)
        return Dense(_symmetric(matrix), problem.n)
    rows = block_products(problem, block, of, samples, generator)
    return MatrixFree(rows, torch.zeros(block.d).to(parameter), problem.n)


def _symmetric(matrix: Tensor) -> Tensor:
    """Matrices with both triangles made equal, without gradient."""
    return ((matrix + matrix.mT) / 2).detach().contiguous()
