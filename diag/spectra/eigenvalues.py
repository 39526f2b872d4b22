"""All eigenvalues of an operator, from its structure or its dense matrix."""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ..operators import (
    BUDGET,
    BlockDiagonal,
    Damped,
    Diagonal,
    Inverse,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    dense,
    like,
)
from ..operators.eigen import KroneckerEigen, Spectral
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.low_rank_terms import LowRankTerms


def eigenvalues(operator: Operator) -> Tensor:
    """All eigenvalues [d], ascending, from the structure where it gives them.

    Kronecker: products of the factors'; low rank and means of few low-rank terms: those of the Gram
    matrix of the columns, and zeros; block-diagonal: the blocks'.

    Raises: ValueError where a dense matrix over the memory budget (4 GiB) would be needed.

    >>> eigenvalues(Kronecker(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))).tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    return eigenvalues_in_any_order(operator).sort().values


@singledispatch
def eigenvalues_in_any_order(operator: Any) -> Tensor:
    """All eigenvalues [d], unsorted; structures register their own way here."""
    if isinstance(operator, KroneckerSum) and len(operator.left) == 1:
        return eigenvalues_in_any_order(operator.terms[0])
    return _of_dense(operator)


@eigenvalues_in_any_order.register
def _(operator: Diagonal) -> Tensor:
    return operator.diagonal


@eigenvalues_in_any_order.register
def _(operator: Kronecker) -> Tensor:
    factors = [torch.linalg.eigvalsh(factor) for factor in (operator.left, operator.right)]
    return torch.outer(*factors).flatten()


@eigenvalues_in_any_order.register
def _(operator: BlockDiagonal) -> Tensor:
    return torch.cat([torch.linalg.eigvalsh(block) for block in operator.blocks])


@eigenvalues_in_any_order.register
def _(operator: LowRank) -> Tensor:
    return gram_eigenvalues(operator.factor)


@eigenvalues_in_any_order.register
def _(operator: Damped) -> Tensor:
    return eigenvalues_in_any_order(operator.base) + operator.damping


@eigenvalues_in_any_order.register
def _(operator: Inverse) -> Tensor:
    return 1 / eigenvalues_in_any_order(operator.base)


@eigenvalues_in_any_order.register
def _(operator: KroneckerEigen) -> Tensor:
    return operator.scale.flatten()


@eigenvalues_in_any_order.register
def _(operator: Spectral) -> Tensor:
    zeros = operator.values.new_zeros(operator.shape[0] - len(operator.values))
    return torch.cat([operator.values, zeros])


@eigenvalues_in_any_order.register
def _(operator: LowRankTerms) -> Tensor:
    (n, k, d), entries = operator.V.shape, like(operator)
    if n * k >= d:
        return _of_dense(operator)
    check_budget(operator, n * k)
    return _with_zeros(operator.column_gram, d).to(entries)


@eigenvalues_in_any_order.register
def _(operator: KroneckerTerms) -> Tensor:
    roots, d = getattr(operator.left, "roots", None), operator.shape[0]
    if roots is None or len(roots) * roots.shape[1] >= d:
        return _of_dense(operator)
    check_budget(operator, len(roots) * roots.shape[1])
    return _with_zeros(operator.column_gram, d).to(roots)


def _of_dense(operator: Operator) -> Tensor:
    check_budget(operator, operator.shape[0])
    return torch.linalg.eigvalsh(dense(operator))


def _with_zeros(gram: Tensor, d: int) -> Tensor:
    """Eigenvalues [d] of F Fᵀ, ascending, from FᵀF [k, k] with k <= d."""
    values = torch.linalg.eigvalsh(gram).clamp(min=0)  # rounding below zero
    return torch.cat([values.new_zeros(d - len(values)), values])


def gram_eigenvalues(factor: Tensor) -> Tensor:
    """Eigenvalues [d] of F Fᵀ for F [d, k], ascending."""
    d, k = factor.shape
    check_budget(factor, min(d, k))
    return _with_zeros(factor.T @ factor if k < d else factor @ factor.T, d)


def check_budget(operator: Operator, size: int) -> None:
    """Raise ValueError for a matrix [size, size] over the memory budget (4 GiB)."""
    if 8 * size * size > BUDGET:
        raise ValueError(
            f"the eigenvalues of a {type(operator).__name__} of {operator.shape[0]} rows need a "
            f"dense matrix of {size} x {size}, {8 * size * size / 2**30:.1f} GiB, over the budget "
            f"of {BUDGET / 2**30:.1f} GiB; use top_eigenpairs or bottom_eigenpairs with "
            f"k <= d / 4, spectral_density or spectral_sum"
        )
