"""What `preconditioner()` returns: linear maps with `.shape` and `@`, views of the live state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Operator(Protocol):
    """A symmetric linear map: a plain tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """(d, d)."""

    def __matmul__(self, other: Tensor) -> Tensor:
        """The map applied to [d] or to the columns of [d, k]."""


@dataclass(frozen=True, eq=False)
class Kronecker:
    """left ⊗ right on the row-major vec of W_bar = [W, b]: vec(M) -> vec(left M rightᵀ).

    left [out, out], right [in+1, in+1]; shape (d, d) with d = out * (in+1).

    Diagonal factors, by hand:
        >>> product = Kronecker(torch.diag(torch.tensor([1.0, 2.0])), 3.0 * torch.eye(2))
        >>> (product @ torch.ones(4)).tolist()
        [3.0, 3.0, 6.0, 6.0]
    """

    left: Operator
    right: Tensor

    @property
    def shape(self) -> torch.Size:
        """(d, d), d = out * (in+1)."""
        d = self.left.shape[0] * self.right.shape[0]
        return torch.Size((d, d))

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to a vector [d] or to the columns of a matrix [d, k]."""
        rows, columns = self.left.shape[0], self.right.shape[0]
        if other.shape[0] != rows * columns:
            raise ValueError(f"shapes do not fit: {tuple(self.shape)} @ {tuple(other.shape)}")
        half = self.left @ other.reshape(rows, -1)
        return (self.right @ half.reshape(rows, columns, -1)).reshape(other.shape)


@dataclass(frozen=True, eq=False)
class BlockDiagonal:
    """Square blocks along the diagonal of the row-major vec of W_bar, in order.

    Two blocks of size one:
        >>> (BlockDiagonal([torch.ones(1, 1), 2 * torch.ones(1, 1)]) @ torch.ones(2)).tolist()
        [1.0, 2.0]
    """

    blocks: Sequence[Operator] | Tensor

    @property
    def shape(self) -> torch.Size:
        """(d, d), d the sum of the blocks' sizes."""
        d = sum(block.shape[0] for block in self.blocks)
        return torch.Size((d, d))

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to a vector [d] or to the columns of a matrix [d, k]."""
        parts = other.split([block.shape[0] for block in self.blocks])
        return torch.cat([block @ part for block, part in zip(self.blocks, parts, strict=True)])


def by_group(maps: Sequence[Operator]) -> Operator:
    """The map of a layer from those of its groups, whose rows of W_bar are contiguous."""
    return maps[0] if len(maps) == 1 else BlockDiagonal(maps)


@dataclass(frozen=True, eq=False)
class CompactInverse:
    """H_g of K-BFGS(L): BFGS on its last p pairs from H = I, never formed.

    H v = v + Sᵀ R⁻ᵀ [(D + Y Yᵀ) R⁻¹ S v - Y v] - Yᵀ R⁻¹ S v

    S, Y [p, out] hold the pairs as rows, oldest first, zero rows where there is none yet;
    R [p, p] is the upper triangle of S Yᵀ (1 on the diagonal of empty rows), D its diagonal,
    YY = Y Yᵀ. R⁻¹ is applied by triangular solves: stored, it loses accuracy in float32.
    Source: Byrd, Nocedal, Schnabel 1994, theorem 2.2, with H_0 = I (arXiv:2006.08877, K-BFGS(L)).

    One pair s = y is no news, H stays I:
        >>> e = torch.tensor([[1.0, 0.0]])
        >>> one = torch.ones(1, 1)
        >>> (CompactInverse(e, e, one, one) @ torch.eye(2)).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    S: Tensor
    Y: Tensor
    R: Tensor
    YY: Tensor

    @property
    def shape(self) -> torch.Size:
        """(out, out), after the axis of a stack if there is one."""
        out = self.S.shape[-1]
        return torch.Size((*self.S.shape[:-2], out, out))

    def __getitem__(self, place: int) -> "CompactInverse":
        """One member of a stack."""
        return CompactInverse(self.S[place], self.Y[place], self.R[place], self.YY[place])

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to [out] or [out, k], of a stack to [b, out, k], in O(p * out * k)."""
        v = other if other.ndim > 1 else other[:, None]
        u = torch.linalg.solve_triangular(self.R, self.S @ v, upper=True)
        inner = self.R.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * u
        inner = inner + self.YY @ u - self.Y @ v
        t = torch.linalg.solve_triangular(self.R.mT, inner, upper=False)
        return (v + self.S.mT @ t - self.Y.mT @ u).reshape(other.shape)
