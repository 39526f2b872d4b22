"""Operators composed of others: difference, product, factorised inverse, identity."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from .forms import dense, to_dense
from .solving import keep
from .structures import Diagonal, Map, Operator, like, square


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

    shape = square(lambda self: self.first.shape[0])

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.first @ v - self.weight * (self.second @ v)


@dataclass(frozen=True, eq=False)
class Product:
    """Matrix product of the factors, leftmost first; not symmetric in general."""

    factors: Sequence[Operator]

    shape = square(lambda self: self.factors[0].shape[0])

    def __matmul__(self, v: Tensor) -> Tensor:
        return reduce(lambda found, factor: factor @ found, reversed(self.factors), v)


@dataclass(frozen=True, eq=False)
class Solved:
    """Inverse given by the function that `solver` returns."""

    apply: Map
    shape: tuple[int, int]

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apply(v)


@to_dense.register
def _(operator: Difference) -> Tensor:
    return dense(operator.first) - operator.weight * dense(operator.second)


@to_dense.register
def _(operator: Product) -> Tensor:
    first, *others = operator.factors
    return reduce(lambda found, factor: found @ dense(factor), others, dense(first))


def identity_like(operator: Operator) -> Diagonal:
    """Identity [d, d] in the operator's dtype and on its device; kept with the operator.

    >>> identity_like(torch.zeros(2, 2)).diagonal.tolist()
    [1.0, 1.0]
    """
    ones = torch.ones(operator.shape[0]).to(like(operator))
    return keep(operator, "identity", lambda: Diagonal(ones))
