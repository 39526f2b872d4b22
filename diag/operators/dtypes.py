"""What operators are made of: the tensors behind one, and the same in another dtype."""

from collections.abc import Callable
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
    Operator,
    like,
)

# what each structure is made of; `made_of` adds to it
_PARTS: dict[type, tuple[str, ...]] = {}


def made_of(kind: type, *names: str) -> None:
    """Register what a structure is made of, which alone can change it.

    names: attributes; all of its constructor's arguments, in their order, unless the structure
    registers a `conversion` of its own.
    """
    _PARTS[kind] = names


@dataclass(frozen=True, eq=False)
class Converted:
    """base for vectors of the dtype and device of `entries` [0]; it computes in its own.

    >>> half = Converted(Diagonal(torch.ones(2)), torch.empty(0, dtype=torch.float32))
    >>> (half @ torch.ones(2, dtype=torch.float32)).dtype
    torch.float32
    """

    base: Operator
    entries: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return tuple(self.base.shape)

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
def _(operator: Converted, damping: float) -> Callable[[Tensor], Tensor]:
    undo, own = solver(operator.base, damping), like(operator.base)
    return lambda v: undo(v.to(own)).to(operator.entries)


def entries_of(operator: Operator) -> Tensor | None:
    """An empty tensor in the operator's dtype and on its device; None where they are unknown."""
    try:
        return like(operator)
    except TypeError:
        return None


def differs(operator: Operator, entries: Tensor) -> bool:
    """Whether the operator is known to be of another dtype or on another device."""
    own = entries_of(operator)
    return own is not None and (own.dtype, own.device) != (entries.dtype, entries.device)


def convert(operator: Operator, entries: Tensor) -> Operator:
    """The operator in the dtype and on the device of `entries`, in the same structure.

    The operator itself where it is so already, or where its dtype is unknown. An inverse, and what
    is no structure of diag, goes on computing in its own dtype: vectors alone are converted.

    >>> convert(Diagonal(torch.ones(2)), torch.empty(0, dtype=torch.float32)).diagonal
    tensor([1., 1.], dtype=torch.float32)
    """
    return conversion(operator, entries) if differs(operator, entries) else operator


@singledispatch
def conversion(operator: Any, entries: Tensor) -> Any:
    """What `convert` does to another dtype; a structure registers its own way here."""
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


@conversion.register
def _(operator: Inverse, entries: Tensor) -> Converted:
    return Converted(operator, entries)


@conversion.register
def _(operator: Converted, entries: Tensor) -> Operator:
    return convert(operator.base, entries)


def tensors(operator: Any) -> list[Tensor] | None:
    """The tensors an operator is made of; None for what is no structure of diag.

    So for a plain tensor and an optimizer's live view: they may change between two looks.
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
    """What tells whether an operator is as it was: its tensors and how often each was changed.

    None where that cannot be told: see `tensors`.
    """
    found = tensors(operator)
    if found is None or any(tensor.is_inference() for tensor in found):  # these count no changes
        return None
    return tuple((id(tensor), tensor._version) for tensor in found)


for _kind, _names in {
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
}.items():
    made_of(_kind, *_names)
