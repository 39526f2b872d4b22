"""Curvature between blocks of parameters, which block-diagonal methods drop."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .backward.positions import layer_positions, required_roots
from .backward.products import block_products
from .exact import TRUTHS
from .operators.structures import by_columns
from .problem import Block, Problem
from .truths.assembly import by_rows, columns


class OffDiagonal:
    """Matrix C_bc [d_b, d_c] between the parameters of two blocks, known by its products."""

    def __init__(self, rows: Callable[[Tensor], Tensor], shape: tuple[int, int], n: int) -> None:
        self._rows = rows
        self.shape = shape
        self.n = n

    def __matmul__(self, v: Tensor) -> Tensor:
        return by_columns(self._rows, v)


def cross(problem: Problem, first: Block, second: Block, of: str = "ggn") -> OffDiagonal:
    """Block of the truth `of` between two blocks of parameters, [d_first, d_second].

    GGN and Fishers: (1/N) Σ_n V_n W_nᵀ from the columns of both; the Hessian from products with
    vectors that are zero outside `second`. The blocks may share parameters.

    Raises: ValueError for an unknown truth, or a loss that is not convex in the outputs.
    """
    shape = (first.d, second.d)
    if of == "hessian":
        both = Block(f"{first.name} x {second.name}", (*first.members, *second.members))
        whole = block_products(problem, both, of, 1, None)

        def rows(v: Tensor) -> Tensor:
            padded = torch.cat([v.new_zeros(len(v), first.d), v], dim=1)
            return whole(padded)[:, : first.d].detach()

        return OffDiagonal(rows, shape, problem.n)
    V, W = _columns(problem, (first, second), of)
    return OffDiagonal(lambda v: (v @ W.T) @ V, shape, problem.n)


def block_norms(problem: Problem, blocks: Sequence[Block], of: str = "ggn") -> Tensor:
    """Frobenius norms of all blocks C_bc of a partition, [B, B], float64.

    ‖C_bc‖² = <M_b, M_c> with M_b = F_b F_bᵀ [N·k, N·k] from the columns of b alone; the Hessian's
    by one product per parameter. The off-block mass of a partition is what is off the diagonal:
    (1 − Σ_b ‖C_bb‖² / Σ_bc ‖C_bc‖²)^½.

    Raises: ValueError for an unknown truth or where M_b is over the problem's budget.
    """
    if of not in TRUTHS:
        raise ValueError(f"no truth '{of}'; known: {list(TRUTHS)}")
    if of == "hessian":
        return _hessian_norms(problem, blocks)
    grams = torch.stack([_column_gram(problem, block, of).flatten() for block in blocks])
    return (grams @ grams.T).clamp(min=0).sqrt()


def off_block_share(norms: Tensor) -> float:
    """Share of the Frobenius norm outside the diagonal blocks, from `block_norms`; in [0, 1]."""
    square = norms.square()
    return (1 - square.diagonal().sum() / square.sum()).clamp(0, 1).sqrt().item()


def _column_gram(problem: Problem, block: Block, of: str) -> Tensor:
    """F Fᵀ [N·k, N·k] with C = FᵀF, without F where the layer sees one row per example."""
    if by_rows(problem, block) is not None and not block.members[0].rows:
        terms = layer_positions(problem, block, of, joint=True)
        a, b = terms.a[:, 0].double(), terms.b[:, :, 0].double()
        (n, k, _), flat = b.shape, b.flatten(0, 1)
        _refuse_large(problem, block, n * k)
        inputs = (a @ a.T).repeat_interleave(k, 0).repeat_interleave(k, 1)
        return (flat @ flat.T) * inputs / n
    F = _columns(problem, (block,), of)[0]
    _refuse_large(problem, block, len(F))
    return (F @ F.T).double()


def _refuse_large(problem: Problem, block: Block, columns_: int) -> None:
    if 16 * columns_**2 > problem.budget:
        raise ValueError(
            f"the Gram matrix of the {columns_:,} columns of block '{block.name}' takes "
            f"{8 * columns_**2 / 2**30:.1f} GiB, too much for the budget of "
            f"{problem.budget / 2**30:.1f} GiB; give fewer examples, 'fisher_mc' (one column per "
            f"example) or a larger budget="
        )


def _columns(problem: Problem, blocks: Sequence[Block], of: str) -> list[Tensor]:
    """F [N·k, d] of each block."""
    found = columns(problem, blocks, required_roots(problem, of, 1, None))
    return [found[block].columns for block in blocks]


def _hessian_norms(problem: Problem, blocks: Sequence[Block]) -> Tensor:
    whole = Block("partition", tuple(m for block in blocks for m in block.members))
    products = block_products(problem, whole, "hessian", 1, None)
    sizes = [block.d for block in blocks]
    like = problem.model.get_parameter(whole.parameters[0])
    rows, start = [], 0
    for size in sizes:
        directions = torch.zeros(size, whole.d).to(like)
        directions[:, start : start + size] = torch.eye(size).to(like)
        parts = products(directions).detach().split(sizes, dim=1)
        rows.append(torch.stack([part.double().norm() for part in parts]))
        start += size
    return torch.stack(rows)
