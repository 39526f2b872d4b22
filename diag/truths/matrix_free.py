"""MatrixFree: a truth known by its products with vectors, for blocks too large to hold."""

import torch
from torch import Tensor

from ..operators.dtypes import Converted, conversion, made_of
from ..operators.forms import to_dense
from ..operators.structures import Map, by_columns, square


class MatrixFree:
    """Operator of a function that multiplies rows [k, d]; n examples are behind it.

    Its norms and errors are estimates from random probes.
    """

    def __init__(self, rows: Map, like: Tensor, n: int) -> None:
        self._rows = rows
        self.like = like  # [d], the dtype and device of its vectors
        self.n = n
        self.kept: dict = {}

    shape = square(lambda self: len(self.like))

    @property
    def dtype(self) -> torch.dtype:
        """Of its vectors."""
        return self.like.dtype

    def __matmul__(self, v: Tensor) -> Tensor:
        return by_columns(lambda rows: self._rows(rows.to(self.like)).detach(), v)


made_of(MatrixFree, "like")  # its function belongs to a problem's own copy, which never changes
conversion.register(MatrixFree, Converted)


@to_dense.register
def _(operator: MatrixFree) -> Tensor:
    matrix = operator @ torch.eye(operator.shape[0]).to(operator.like)
    return (matrix + matrix.T) / 2
