"""Frobenius inner products and norms from structure."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .forms import dense, diagonal
from .structures import BlockDiagonal, Diagonal, Kronecker, KroneckerSum, LowRank, Operator

# (type, type) -> function, looked up either way round
_INNER: dict[tuple[type, type], Callable[[Any, Any], Tensor]] = {}


def inner_rule(first: type, *seconds: type) -> Callable:
    """Register the function that `inner` uses for `first` with each of the second structures."""

    def register(function: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
        _INNER.update({(first, second): function for second in seconds})
        return function

    return register


def inner(first: Operator, second: Operator) -> float:
    """Frobenius inner product <first, second> = tr(firstᵀ second).

    Raises: ValueError when the shapes differ.
    """
    if tuple(first.shape) != tuple(second.shape):
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")
    if rule := _INNER.get((type(first), type(second))):
        return float(rule(first, second))
    if rule := _INNER.get((type(second), type(first))):
        return float(rule(second, first))
    if isinstance(first, Diagonal) or isinstance(second, Diagonal):
        return (diagonal(first) @ diagonal(second)).item()
    return float((dense(first) * dense(second)).sum())


@inner_rule(Kronecker, Kronecker)
def _(first: Kronecker, second: Kronecker) -> Tensor:
    return (first.left * second.left).sum() * (first.right * second.right).sum()


@inner_rule(KroneckerSum, KroneckerSum)
def _(first: KroneckerSum, second: KroneckerSum) -> Tensor:
    lefts = first.left.flatten(1) @ second.left.flatten(1).T
    return (lefts * (first.right.flatten(1) @ second.right.flatten(1).T)).sum()


@inner_rule(Kronecker, KroneckerSum)
def _(first: Kronecker, second: KroneckerSum) -> Tensor:
    lefts = second.left.flatten(1) @ first.left.flatten()
    return lefts @ (second.right.flatten(1) @ first.right.flatten())


@inner_rule(BlockDiagonal, BlockDiagonal)
def _(first: BlockDiagonal, second: BlockDiagonal) -> Tensor:
    alike = [len(b) for b in first.blocks] == [len(b) for b in second.blocks]
    if not alike or first.order is not None or second.order is not None:
        return (dense(first) * dense(second)).sum()
    pairs = zip(first.blocks, second.blocks, strict=True)
    return torch.stack([(a * b).sum() for a, b in pairs]).sum()


@inner_rule(LowRank, LowRank)
def _(first: LowRank, second: LowRank) -> Tensor:
    return (first.factor.T @ second.factor).square().sum()


def frobenius_norm(operator: Operator) -> float:
    """Frobenius norm ‖operator‖_F.

    >>> frobenius_norm(Diagonal(torch.tensor([3.0, 4.0])))
    5.0
    """
    return max(inner(operator, operator), 0.0) ** 0.5
