"""Dense form, diagonal and trace of an operator."""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from .structures import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    like,
)

BUDGET = 4 * 2**30  # bytes; the largest dense matrix `dense` builds unless told otherwise


def dense(operator: Operator, budget: int = BUDGET) -> Tensor:
    """Matrix [d, d] in full.

    Raises: ValueError when it needs more than `budget` bytes (default 4 GiB).

    >>> dense(Kronecker(torch.eye(2), torch.tensor([[3.0]]))).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """
    d = operator.shape[0]
    size = d * d * 8
    if size > budget:
        raise ValueError(
            f"the dense matrix of {d} x {d} needs {size / 2**30:.1f} GiB, over the budget of "
            f"{budget / 2**30:.1f} GiB; use operator @ v, frobenius_norm, inner, trace or "
            f"diagonal, which never form it, or pass a larger budget="
        )
    return to_dense(operator)


@singledispatch
def to_dense(operator: Any) -> Tensor:
    """Matrix [d, d] of any size; structures register their own form here."""
    if not hasattr(operator, "shape") or not hasattr(operator, "__matmul__"):
        raise TypeError(
            f"no dense form of {type(operator).__name__}; give an operator of diag.operators, "
            f"a tensor [d, d], or anything with .shape and @"
        )
    return operator @ torch.eye(operator.shape[0]).to(like(operator))


@to_dense.register
def _(operator: Tensor) -> Tensor:
    return operator


@to_dense.register
def _(operator: Dense) -> Tensor:
    return operator.matrix


@to_dense.register
def _(operator: Kronecker) -> Tensor:
    return torch.kron(operator.left, operator.right)


@to_dense.register
def _(operator: KroneckerSum) -> Tensor:
    return torch.stack([to_dense(term) for term in operator.terms]).sum(0)


@to_dense.register
def _(operator: BlockDiagonal) -> Tensor:
    matrix = torch.block_diag(*operator.blocks)
    if operator.order is None:
        return matrix
    back = operator.order.argsort()
    return matrix[back][:, back]


@to_dense.register
def _(operator: Diagonal) -> Tensor:
    return torch.diag(operator.diagonal)


@to_dense.register
def _(operator: LowRank) -> Tensor:
    return operator.factor @ operator.factor.T


@to_dense.register
def _(operator: Damped) -> Tensor:
    matrix = to_dense(operator.base).clone()
    matrix.diagonal().add_(operator.damping)
    return matrix


@singledispatch
def diagonal(operator: Any) -> Tensor:
    """Diagonal [d]; structures register their own form here."""
    return dense(operator).diagonal()


@diagonal.register
def _(operator: Kronecker) -> Tensor:
    return torch.outer(operator.left.diagonal(), operator.right.diagonal()).reshape(-1)


@diagonal.register
def _(operator: KroneckerSum) -> Tensor:
    return torch.stack([diagonal(term) for term in operator.terms]).sum(0)


@diagonal.register
def _(operator: Diagonal) -> Tensor:
    return operator.diagonal


@diagonal.register
def _(operator: LowRank) -> Tensor:
    return operator.factor.square().sum(1)


@diagonal.register
def _(operator: BlockDiagonal) -> Tensor:
    entries = torch.cat([block.diagonal() for block in operator.blocks])
    return entries if operator.order is None else entries[operator.order.argsort()]


@diagonal.register
def _(operator: Damped) -> Tensor:
    return diagonal(operator.base) + operator.damping


def trace(operator: Operator) -> float:
    """Trace, the sum of the diagonal."""
    if isinstance(operator, Kronecker):
        return (operator.left.trace() * operator.right.trace()).item()
    return diagonal(operator).sum().item()
