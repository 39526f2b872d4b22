"""Matrix structures: Dense, Kronecker, KroneckerSum, BlockDiagonal, Diagonal, LowRank, Damped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]  # a linear map of vectors, [d] or [d, k] unless said otherwise


@runtime_checkable
class Operator(Protocol):
    """Symmetric matrix: `.shape` is (d, d), `@` multiplies [d] or [d, k]."""

    @property
    def shape(self) -> Any:
        """(d, d)."""

    def __matmul__(self, other: Tensor, /) -> Tensor: ...


def by_columns(function: Map, v: Tensor) -> Tensor:
    """Apply a function of [k, d] row vectors to v [d] or [d, k]."""
    return function(v.T).T if v.ndim == 2 else function(v[None])[0]


def square(rows: Callable[[Any], int]) -> Any:
    """The property `.shape`, (d, d), of operators with d = rows(operator)."""
    return property(lambda operator: (rows(operator),) * 2, doc="(d, d).")


@dataclass(frozen=True, eq=False)
class Dense:
    """Matrix [d, d] in full; n: examples it is the mean over, 0 if unknown."""

    matrix: Tensor
    n: int = 0
    kept: dict = field(default_factory=dict, repr=False)  # factorisations

    shape = square(lambda self: len(self.matrix))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matrix @ v


@dataclass(frozen=True, eq=False)
class Kronecker:
    """left [o, o] ⊗ right [i, i]: (left ⊗ right) vec(M) = vec(left M rightᵀ), M [o, i]."""

    left: Tensor
    right: Tensor

    shape = square(lambda self: len(self.left) * len(self.right))

    def __matmul__(self, v: Tensor) -> Tensor:
        o, i = len(self.left), len(self.right)
        return by_columns(
            lambda rows: (self.left @ rows.reshape(-1, o, i) @ self.right.T).reshape(-1, o * i), v
        )


@dataclass(frozen=True, eq=False)
class KroneckerSum:
    """Σ_k left_k ⊗ right_k with left [r, o, o] and right [r, i, i]."""

    left: Tensor
    right: Tensor

    @property
    def terms(self) -> list[Kronecker]:
        """The r Kronecker products."""
        return [Kronecker(left, right) for left, right in zip(self.left, self.right, strict=True)]

    shape = square(lambda self: self.left.shape[-1] * self.right.shape[-1])

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.stack([term @ v for term in self.terms]).sum(0)


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """Diagonal blocks [k, s, s], or a list of [s_j, s_j], on coordinates listed in `order` [d].

    The first block is on coordinates order[:s], the next on order[s:2s], ...; None: 0 ... d - 1.
    """

    blocks: Tensor | Sequence[Tensor]
    order: Tensor | None = None

    shape = square(lambda self: sum(len(block) for block in self.blocks))

    def __matmul__(self, v: Tensor) -> Tensor:
        columns = v[:, None] if v.ndim == 1 else v
        columns = columns if self.order is None else columns[self.order]
        if isinstance(self.blocks, Tensor):
            k, s, _ = self.blocks.shape
            out = (self.blocks @ columns.reshape(k, s, -1)).reshape(k * s, -1)
        else:
            parts = columns.split([len(block) for block in self.blocks])
            pairs = zip(self.blocks, parts, strict=True)
            out = torch.cat([block @ part for block, part in pairs])
        if self.order is not None:
            out = torch.empty_like(out).index_copy(0, self.order, out)
        return out[:, 0] if v.ndim == 1 else out


@dataclass(frozen=True, eq=False)
class Diagonal:
    """diag(diagonal), diagonal [d]."""

    diagonal: Tensor

    shape = square(lambda self: len(self.diagonal))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.diagonal * v if v.ndim == 1 else self.diagonal[:, None] * v


@dataclass(frozen=True, eq=False)
class LowRank:
    """factor factorᵀ with factor [d, k]."""

    factor: Tensor

    shape = square(lambda self: len(self.factor))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.factor @ (self.factor.T @ v)


@dataclass(frozen=True, eq=False)
class Damped:
    """base + damping · I."""

    base: Operator
    damping: float

    shape = square(lambda self: self.base.shape[0])

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.base @ v + self.damping * v


def like(operator: Operator) -> Tensor:
    """Empty tensor [0] with the dtype and device of an operator, for `v.to(like(C))`.

    Raises: TypeError for an operator without `.dtype` and `.device` that holds no float tensor.

    >>> from kronscope.diag.operators.structures import Damped, Diagonal
    >>> like(Damped(Diagonal(torch.ones(3, dtype=torch.float32)), 0.1)).dtype
    torch.float32
    """
    found = _find(operator)
    if found is None:
        raise TypeError(
            f"the dtype and device of {type(operator).__name__} are unknown: it holds no "
            f"floating-point tensor; give it the attributes .dtype and .device"
        )
    return found


def _find(thing: Any) -> Tensor | None:
    dtype, device = getattr(thing, "dtype", None), getattr(thing, "device", None)
    if isinstance(dtype, torch.dtype) and device is not None:
        return torch.empty(0, dtype=dtype, device=device) if dtype.is_floating_point else None
    if isinstance(thing, Operator):
        parts: Sequence[Any] = list(getattr(thing, "__dict__", {}).values())
    elif isinstance(thing, list | tuple):
        parts = thing
    else:
        return None
    return next((found for part in parts if (found := _find(part)) is not None), None)
