"""Per-example terms of a layer's truth, and the sums of them that Kronecker methods need.

A Linear layer with one row per example has KroneckerTerms C_n ⊗ a_n a_nᵀ, for any truth; a layer
used at T positions has Positions, terms Σ_k vec V_nk vec V_nkᵀ with V_nk = Σ_t b_nkt a_ntᵀ, for the
truths that have roots b. At T = 1 the two are the same sums.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backward.positions import Positions, layer_positions
from ..exact import truth
from ..problem import Block, Problem
from ..truths.assembly import by_rows
from ..truths.kronecker_terms import KroneckerTerms

Terms = KroneckerTerms | Positions

CHUNK = 2**24  # floats of temporary results at once
EVERY_BLOCK = "diagonal, groups, low_rank and the exact truths work for every block"


def terms(problem: Problem, block: Block, of: str, asked_by: str) -> Terms:
    """The terms of a layer's block.

    Raises: ValueError naming block, method and reason where there are none.
    """
    if by_rows(problem, block) is None:
        return roots(problem, block, of, asked_by)
    found = truth(problem, block, of)
    if not isinstance(found, KroneckerTerms):
        raise ValueError(
            f"{asked_by} needs the {of} of block '{block.name}' as per-example Kronecker terms, "
            f"which do not fit the budget of {problem.budget / 2**30:.1f} GiB; give Problem fewer "
            f"examples, dtype=torch.float32 or a larger budget="
        )
    return found


def roots(problem: Problem, block: Block, of: str, asked_by: str) -> Positions:
    """Inputs and root gradients of a layer at its positions.

    Raises: ValueError naming block, method and reason for another kind of block or truth.
    """
    try:
        return layer_positions(problem, block, of)
    except ValueError as error:
        raise ValueError(
            f"{asked_by} needs a Linear layer or a convolution and a truth made of gradients (of a "
            f"Linear layer with one row per example most methods take every truth); of the {of} "
            f"of block '{block.name}': {error}; {EVERY_BLOCK}"
        ) from error


def kfac_factors(terms: Terms) -> tuple[Tensor, Tensor]:
    """G [o, o] and A [i, i] of KFAC (expand): means over examples, G also over positions.

    A = (1/N) Σ_n Σ_t a aᵀ and G = (1/(N T)) Σ_n Σ_t Σ_k b bᵀ.
    """
    if isinstance(terms, KroneckerTerms):
        return terms.left_mean, terms.right_mean
    n, positions, _ = terms.a.shape
    a, b = terms.a.flatten(0, 1), terms.b.flatten(0, 2)
    return b.T @ b / (n * positions), a.T @ a / n


def partial_traces(terms: Terms) -> tuple[Tensor, Tensor]:
    """Partial traces of the block: E[V Vᵀ] [o, o] over inputs, E[Vᵀ V] [i, i] over outputs.

    Both have the block's trace; pairs of different positions are included.
    """
    if isinstance(terms, KroneckerTerms):
        squares, traces = terms.a.square().sum(1), terms.left.diagonals().sum(1)
        left = terms.left.weighted(squares[None] / terms.n)[0]
        return left, (terms.a * traces[:, None]).T @ terms.a / terms.n
    left = terms.b.new_zeros(terms.b.shape[3], terms.b.shape[3])
    right = terms.a.new_zeros(terms.a.shape[2], terms.a.shape[2])
    for a, b in _chunks(terms, terms.a.shape[1] ** 2):
        met = (a @ a.mT)[:, None] @ b  # Σ_t' (a_t·a_t') b_t', [n, k, T, o]
        left += b.flatten(0, 2).T @ met.flatten(0, 2)
        meeting = b.movedim(2, 1).flatten(2)  # [n, T, k·o]
        right += a.flatten(0, 1).T @ (meeting @ meeting.mT @ a).flatten(0, 1)
    return left / len(terms.a), right / len(terms.a)


def projected_diagonal(terms: Terms, U: Tensor, W: Tensor) -> Tensor:
    """Diagonal of (U ⊗ W)ᵀ C (U ⊗ W) as a matrix [o, i]: mean_n Σ_k (Uᵀ V_nk W)²."""
    if isinstance(terms, KroneckerTerms):
        some = max(1, CHUNK // (terms.n * len(U)))
        bent = [
            (part * terms.left.apply(part.expand(terms.n, -1, -1))).sum(1)  # u·C_n u, [n, some]
            for part in U.split(some, dim=1)
        ]
        return torch.cat(bent, dim=1).T @ (terms.a @ W).square() / terms.n
    total = U.new_zeros(len(U), len(W))
    for a, b in _chunks(terms, terms.b.shape[1] * total.numel()):
        turned = (b @ U).mT @ (a @ W)[:, None]  # Uᵀ V_nk W: positions are summed before squaring
        total += turned.square().sum((0, 1))
    return total / len(terms.a)


def _chunks(terms: Positions, floats_each: int) -> Iterator[tuple[Tensor, Tensor]]:
    some = max(1, CHUNK // floats_each)
    return zip(terms.a.split(some), terms.b.split(some), strict=True)
