"""The structures: Dense, Kronecker, KroneckerSum, BlockDiagonal, Diagonal, LowRank, Damped."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Operator(Protocol):
    """What every operator has: `.shape` (d, d) and `@` with [d] or [d, k]."""

    @property
    def shape(self) -> Any:
        """(d, d)."""
        ...

    def __matmul__(self, other: Tensor, /) -> Tensor: ...


def by_columns(function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Apply a function of [k, d] row vectors to v [d] or [d, k]."""
    return function(v.T).T if v.ndim == 2 else function(v[None])[0]


@dataclass(frozen=True, eq=False)
class Dense:
    """A matrix [d, d] held in full; n counts the examples it is the mean over, 0 if unknown."""

    matrix: Tensor
    n: int = 0
    kept: dict = field(default_factory=dict, repr=False)  # factorisations, for the next question

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (len(self.matrix), len(self.matrix))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.matrix @ v


@dataclass(frozen=True, eq=False)
class Kronecker:
    """left [o, o] ⊗ right [i, i]: (left ⊗ right) vec(M) = vec(left M rightᵀ), M [o, i]."""

    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(o·i, o·i)."""
        d = len(self.left) * len(self.right)
        return (d, d)

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

    @property
    def shape(self) -> tuple[int, int]:
        """(o·i, o·i)."""
        return self.terms[0].shape

    def __matmul__(self, v: Tensor) -> Tensor:
        return torch.stack([term @ v for term in self.terms]).sum(0)


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """Square blocks along the diagonal, of the coordinates listed in `order` [d].

    blocks: [k, s, s] or a list of [s_j, s_j]. order: None for coordinates as they come; else the
    first block sits on coordinates order[:s], the next on order[s:2s], and so on.
    """

    blocks: Tensor | Sequence[Tensor]
    order: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        d = sum(len(block) for block in self.blocks)
        return (d, d)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.apply(lambda block, part: block @ part, v)

    def apply(self, function: Callable[[Tensor, Tensor], Tensor], v: Tensor) -> Tensor:
        """function(block, part of v [s, k]) block by block, put back in place."""
        columns = v[:, None] if v.ndim == 1 else v
        columns = columns if self.order is None else columns[self.order]
        if isinstance(self.blocks, Tensor):
            k, s, _ = self.blocks.shape
            out = function(self.blocks, columns.reshape(k, s, -1)).reshape(k * s, -1)
        else:
            parts = columns.split([len(block) for block in self.blocks])
            pairs = zip(self.blocks, parts, strict=True)
            out = torch.cat([function(block, part) for block, part in pairs])
        if self.order is not None:
            out = torch.empty_like(out).index_copy(0, self.order, out)
        return out[:, 0] if v.ndim == 1 else out


@dataclass(frozen=True, eq=False)
class Diagonal:
    """diag(diagonal), diagonal [d]."""

    diagonal: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (len(self.diagonal), len(self.diagonal))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.diagonal * v if v.ndim == 1 else self.diagonal[:, None] * v


@dataclass(frozen=True, eq=False)
class LowRank:
    """factor factorᵀ with factor [d, k]."""

    factor: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (len(self.factor), len(self.factor))

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.factor @ (self.factor.T @ v)


@dataclass(frozen=True, eq=False)
class Damped:
    """base + damping · I."""

    base: Operator
    damping: float

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return tuple(self.base.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.base @ v + self.damping * v


def like(operator: Operator) -> Tensor:
    """Return an empty tensor [0] with the dtype and device of `operator`, for `v.to(like(C))`.

    They are those of the operator itself where it has `.dtype` and `.device`, else those of the
    first floating-point tensor it holds, directly, in a sequence or in an operator it wraps.

    Raises: TypeError when it holds none.

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
