"""The tensors an operator holds, and conversion of operators to another dtype or device."""

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from .eigen import KroneckerEigen, Spectral
from .forms import dense, to_dense
from .single_step import SingleStep
from .solving import Inverse, solver, solver_rule
from .structures import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    Map,
    Operator,
    like,
    square,
)

# attributes of each structure; `made_of` adds to it
_PARTS: dict[type, tuple[str, ...]] = {}


def made_of(kind: type, *names: str) -> None:
    """Register the attributes that make up a structure.

    names: the arguments of its constructor, in order, unless it registers a `conversion`.
    """
    _PARTS[kind] = names


@dataclass(frozen=True, eq=False)
class Converted:
    """Operator for vectors of the dtype and device of `entries` [0]; base computes in its own.

    >>> half = Converted(Diagonal(torch.ones(2)), torch.empty(0, dtype=torch.float32))
    >>> (half @ torch.ones(2, dtype=torch.float32)).dtype
    torch.float32
    """

    base: Operator
    entries: Tensor

    shape = square(lambda self: self.base.shape[0])

    @property
    def dtype(self) -> torch.dtype:
        """Of its vectors."""
        return self.entries.dtype

    @property
    def device(self) -> torch.device:
        """Of its vectors."""
        return self.entries.device

    def __matmul__(self, v: Tensor) -> Tensor:
        return (self.base @ v.to(like(self.base))).to(self.entries)


@to_dense.register
def _(operator: Converted) -> Tensor:
    return dense(operator.base).to(operator.entries)


@solver_rule(Converted)
def _(operator: Converted, damping: float) -> Map:
    undo, own = solver(operator.base, damping), like(operator.base)
    return lambda v: undo(v.to(own)).to(operator.entries)


def entries_of(operator: Operator) -> Tensor | None:
    """`like(operator)`, or None where dtype and device are unknown."""
    try:
        return like(operator)
    except TypeError:
        return None


def differs(operator: Operator, entries: Tensor) -> bool:
    """Whether the operator has another dtype or device, as far as known."""
    own = entries_of(operator)
    return own is not None and (own.dtype, own.device) != (entries.dtype, entries.device)


def convert(operator: Operator, entries: Tensor) -> Operator:
    """The operator in the dtype and on the device of `entries`, in the same structure.

    Itself where nothing differs or its dtype is unknown. Of an inverse, and of what is no structure
    of diag, only the vectors are converted.

    >>> convert(Diagonal(torch.ones(2)), torch.empty(0, dtype=torch.float32)).diagonal
    tensor([1., 1.], dtype=torch.float32)
    """
    return conversion(operator, entries) if differs(operator, entries) else operator


@singledispatch
def conversion(operator: Any, entries: Tensor) -> Any:
    """The operator converted; structures register here what differs from converting each part."""
    names = _PARTS.get(type(operator))
    if names is None:
        return Converted(operator, entries)
    return type(operator)(*(_convert_part(getattr(operator, name), entries) for name in names))


def _convert_part(part: Any, entries: Tensor) -> Any:
    if isinstance(part, list | tuple):
        return [_convert_part(each, entries) for each in part]
    if isinstance(part, Tensor):
        return part.to(entries if part.is_floating_point() else entries.device)
    if isinstance(part, Operator):
        return convert(part, entries)
    return conversion(part, entries) if type(part) in _PARTS else part


@conversion.register
def _(operator: Tensor, entries: Tensor) -> Tensor:
    return operator.to(entries)


conversion.register(Inverse, Converted)


@conversion.register
def _(operator: Converted, entries: Tensor) -> Operator:
    return convert(operator.base, entries)


def tensors(operator: Any) -> list[Tensor] | None:
    """The tensors an operator holds; None for what is no structure of diag.

    A plain tensor or an optimizer's live view may change unnoticed.
    """
    return _gathered(operator) if type(operator) in _PARTS else None


def _gathered(part: Any) -> list[Tensor] | None:
    if isinstance(part, Tensor):
        return [part]
    if isinstance(part, list | tuple):
        inside = list(part)
    elif names := _PARTS.get(type(part)):
        inside = [getattr(part, name) for name in names]
    else:
        return None if isinstance(part, Operator) else []
    found = [_gathered(each) for each in inside]
    return None if any(own is None for own in found) else [t for own in found for t in own or []]


def versions(operator: Any) -> tuple[tuple[int, int], ...] | None:
    """Identity and version counter of each of the operator's tensors; None where unknown."""
    found = tensors(operator)
    if found is None or any(tensor.is_inference() for tensor in found):  # these count no changes
        return None
    return tuple((id(tensor), tensor._version) for tensor in found)


_PARTS |= {
    Dense: ("matrix", "n"),
    Kronecker: ("left", "right"),
    KroneckerSum: ("left", "right"),
    BlockDiagonal: ("blocks", "order"),
    Diagonal: ("diagonal",),
    LowRank: ("factor",),
    Damped: ("base", "damping"),
    KroneckerEigen: ("left_basis", "right_basis", "scale"),
    Spectral: ("basis", "values"),
    SingleStep: ("gradient", "step"),
    Inverse: ("base",),
    Converted: ("base", "entries"),
}
