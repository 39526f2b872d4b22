"""Operators made of others: a difference and a product, applied one after the other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

from torch import Tensor

from diag.operators import Operator, dense
from diag.operators.forms import to_dense


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
