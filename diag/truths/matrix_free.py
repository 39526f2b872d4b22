"""A truth known by its products alone, for blocks too large to hold."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..operators.dtypes import Converted, conversion, made_of
from ..operators.forms import to_dense
from ..operators.structures import by_columns


class MatrixFree:
    """The operator of a function that multiplies rows [k, d]; n examples are behind it.

    Norms and errors of it are estimates from random probes, with intervals.
    """

    def __init__(self, rows: Callable[[Tensor], Tensor], like: Tensor, n: int) -> None:
        self._rows = rows
        self.like = like  # [d], the dtype and device of its vectors
        self.n = n
        self.kept: dict = {}

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (len(self.like), len(self.like))

    @property
    def dtype(self) -> torch.dtype:
        """Of its vectors."""
        return self.like.dtype

    def __matmul__(self, v: Tensor) -> Tensor:
        return by_columns(lambda rows: self._rows(rows.to(self.like)).detach(), v)


made_of(MatrixFree, "like")  # its function is of a problem's own copy, which stays as it is


@conversion.register
def _(operator: MatrixFree, entries: Tensor) -> Converted:
    return Converted(operator, entries)


@to_dense.register
def _(operator: MatrixFree) -> Tensor:
    matrix = operator @ torch.eye(operator.shape[0]).to(operator.like)
    return (matrix + matrix.T) / 2
