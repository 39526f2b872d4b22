"""Operators made of others: a difference, a product, an inverse factorised once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .forms import dense, to_dense
from .solving import keep
from .structures import Diagonal, Operator, like


@dataclass(frozen=True, eq=False)
class Difference:
    """first - weight · second.

    >>> import torch
    >>> Difference(torch.eye(2), 0.5 * torch.eye(2)) @ torch.ones(2)
    tensor([0.5000, 0.5000])
    """

    first: Operator
    second: Operator
    weight: float = 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return tuple(self.first.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.first @ v - self.weight * (self.second @ v)


@dataclass(frozen=True, eq=False)
class Product:
    """The matrix product of the factors, leftmost first; not symmetric in general."""

    factors: Sequence[Operator]

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return tuple(self.factors[0].shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return reduce(lambda found, factor: factor @ found, reversed(self.factors), v)


@dataclass(frozen=True, eq=False)
class Solved:
    """An inverse as what `solver` returns: factorised once, where `Inverse` does it at each `@`."""

    apply: Callable[[Tensor], Tensor]
    shape: tuple[int, int]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apply(v)


@to_dense.register
def _(operator: Difference) -> Tensor:
    return dense(operator.first) - operator.weight * dense(operator.second)


@to_dense.register
def _(operator: Product) -> Tensor:
    return reduce(
        lambda found, factor: found @ dense(factor),
        operator.factors[1:],
        dense(operator.factors[0]),
    )


def identity_like(operator: Operator) -> Diagonal:
    """I [d, d] in the operator's dtype and on its device; <C, I> = tr C. Kept with the operator.

    >>> identity_like(torch.zeros(2, 2)).diagonal.tolist()
    [1.0, 1.0]
    """
    return keep(
        operator,
        "identity",
        lambda: Diagonal(torch.ones(operator.shape[0]).to(like(operator))),
    )
