"""Linear operators returned by `preconditioner()` and `curvature()`, with `.shape` and `@`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .products import faster_library
from .sample_space import add_combination_, projected, solved


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
    right: Operator

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
class Identity:
    """The map that changes nothing, of size n.

    >>> (Identity(2) @ torch.ones(2)).tolist()
    [1.0, 1.0]
    """

    n: int

    @property
    def shape(self) -> torch.Size:
        """(n, n)."""
        return torch.Size((self.n, self.n))

    def __matmul__(self, other: Tensor) -> Tensor:
        """What comes, as it is."""
        return other


@dataclass(frozen=True, eq=False)
class KroneckerEigen:
    """U diag(values) Uᵀ, U = left ⊗ right: M -> left [(leftᵀ M right) ∘ values] rightᵀ on vec(M).

    Orthogonal left [out, out], right [in+1, in+1] hold eigenvectors as columns, values
    [out, in+1] the eigenvalues; shape (d, d) on the row-major vec of W_bar, d = out * (in+1).

        >>> eigen = KroneckerEigen(torch.eye(1), torch.eye(2), torch.tensor([[2.0, 3.0]]))
        >>> (eigen @ torch.ones(2)).tolist()
        [2.0, 3.0]
    """

    left_vectors: Tensor
    right_vectors: Tensor
    values: Tensor

    @property
    def shape(self) -> torch.Size:
        """(d, d), d = out * (in+1)."""
        d = self.values.numel()
        return torch.Size((d, d))

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to a vector [d] or to the columns of a matrix [d, k]."""
        left, right = self.left_vectors, self.right_vectors
        inside = Kronecker(left.mT, right.mT) @ other
        scaled = self.values.reshape(-1, *[1] * (other.ndim - 1)) * inside
        return Kronecker(left, right) @ scaled


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
        with faster_library(v, self.S.numel() * v.shape[-1]):
            return self._applied(v).reshape(other.shape)

    def _applied(self, v: Tensor) -> Tensor:
        u = torch.linalg.solve_triangular(self.R, self.S @ v, upper=True)
        inner = self.R.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * u
        inner = inner + self.YY @ u - self.Y @ v
        t = torch.linalg.solve_triangular(self.R.mT, inner, upper=False)
        return v + self.S.mT @ t - self.Y.mT @ u


@dataclass(frozen=True, eq=False)
class RankOneInverse:
    """(damping I + g gᵀ ⊗ x xᵀ)⁻¹ on the row-major vec of W_bar, by Sherman-Morrison.

    g [out], x [in+1].

    By hand, 1 / (1 + 3) in the direction of g ⊗ x:
        >>> one = torch.ones(1)
        >>> round((RankOneInverse(one, one * 3**0.5, 1.0) @ torch.ones(1)).item(), 6)
        0.25
    """

    g: Tensor
    x: Tensor
    damping: float

    @property
    def shape(self) -> torch.Size:
        """(d, d), d = out * (in+1)."""
        d = len(self.g) * len(self.x)
        return torch.Size((d, d))

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to a vector [d] or to the columns of a matrix [d, k], in O(d k)."""
        u = torch.outer(self.g, self.x).reshape(-1)
        p = (u @ other) / (u.square().sum() + self.damping)
        along = u * p if other.ndim == 1 else torch.outer(u, p)
        return (other - along) / self.damping


@dataclass(frozen=True, eq=False)
class ExampleSum:
    """F = Σ_n vec V_n (vec V_n)ᵀ from the rows of its examples, never formed.

    V_n is W_bar-shaped, the Σ_t g_nt x_ntᵀ of each group of a layer on top of each other;
    g [groups, m, T, out], x [groups, m, T, in+1].

    One example with V = 2:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> (ExampleSum(one, 2 * one) @ torch.ones(1)).item()
        4.0
    """

    g: Tensor
    x: Tensor

    @property
    def shape(self) -> torch.Size:
        """(d, d), d the size of V_n."""
        d = self.g.shape[0] * self.g.shape[-1] * self.x.shape[-1]
        return torch.Size((d, d))

    def project(self, v: Tensor) -> Tensor:
        """⟨V_n, v⟩ for each example, [m]."""
        M = v.reshape(len(self.g), self.g.shape[-1], self.x.shape[-1])
        return projected(self.g, self.x, M).sum(0)

    def combine(self, weights: Tensor) -> Tensor:
        """Vector Σ_n weights_n vec V_n, [d]."""
        out = self.g.new_zeros(len(self.g), self.g.shape[-1], self.x.shape[-1])
        return add_combination_(out, self.g, self.x, weights.expand(len(self.g), -1)).reshape(-1)

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to a vector [d] or to each column of a matrix [d, k]."""
        if other.ndim > 1:
            return torch.stack([self @ column for column in other.unbind(1)], 1)
        return self.combine(self.project(other))


@dataclass(frozen=True, eq=False)
class Woodbury:
    """(F + damping I)⁻¹ for a sum F over examples with L Lᵀ = K + damping I, K their Gram matrix.

    v -> (v - Σ_n ζ_n vec V_n) / damping, ζ = (K + damping I)⁻¹ t, t_n = ⟨V_n, v⟩.
    L [m, m], damping 0-d.

    By hand, V = 2:
        >>> one = torch.ones(1, 1, 1, 1)
        >>> F, L = ExampleSum(one, 2 * one), torch.tensor([[5.0]]).sqrt()
        >>> round((Woodbury(F, L, torch.tensor(1.0)) @ torch.ones(1)).item(), 6)
        0.2
    """

    F: ExampleSum
    L: Tensor
    damping: Tensor

    @property
    def shape(self) -> torch.Size:
        """(d, d)."""
        return self.F.shape

    def __matmul__(self, other: Tensor) -> Tensor:
        """Apply to a vector [d] or to each column of a matrix [d, k]."""
        if other.ndim > 1:
            return torch.stack([self @ column for column in other.unbind(1)], 1)
        zeta = solved(self.L, self.F.project(other))
        return (other - self.F.combine(zeta)) / self.damping
