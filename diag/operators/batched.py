"""Batches of N symmetric k x k matrices C_n: packed, as products RᵀR of few rows, or diagonal.

They are one side of a mean of Kronecker products. Inner products are summed in float64.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

COLUMNS = 2**14  # of a Gram product at once: what float32 sums before float64 takes over


class BatchedSymmetric(Protocol):
    """Interface of a batch of symmetric matrices C_n [k, k], n = 1 ... N."""

    @property
    def size(self) -> int:
        """Rows k of each matrix."""

    def gram(self) -> Tensor:
        """<C_n, C_m>, [N, N], float64."""

    def inners(self, matrix: Tensor) -> Tensor:
        """<C_n, matrix> for a matrix [k, k], [N], or for several [r, k, k], [N, r]."""

    def mean(self) -> Tensor:
        """Mean matrix, [k, k]."""

    def diagonals(self) -> Tensor:
        """Diagonals [N, k]."""

    def matrices(self) -> Tensor:
        """All matrices in full, [N, k, k]."""

    def apply(self, v: Tensor) -> Tensor:
        """C_n v_n for v [N, k, c], [N, k, c]."""

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_n w_rn C_n for weights [r, N], [r, k, k]."""

    def centred_gram(self) -> Tensor:
        """<C_n − C̄, C_m − C̄>, [N, N], float64."""


@dataclass(frozen=True, eq=False)
class Packed:
    """Symmetric matrices as packed mean [p] and deviations [N, p], apart against cancellation."""

    centre: Tensor
    deviations: Tensor
    size: int

    @classmethod
    def of(cls, matrices: Tensor) -> "Packed":
        """From symmetric matrices [N, k, k]."""
        return cls.consume(pack(matrices), matrices.shape[-1])

    @classmethod
    def consume(cls, packed: Tensor, size: int) -> "Packed":
        """From packed matrices [N, p], which are overwritten."""
        centre = packed.mean(0)
        return cls(centre, packed.sub_(centre), size)

    @cached_property
    def _own(self) -> Tensor:
        return summed_gram(self.deviations)

    def centred_gram(self) -> Tensor:
        """<C_n − C̄, C_m − C̄>, [N, N], float64, without cancellation."""
        return self._own

    def gram(self) -> Tensor:
        """<C_n, C_m>, [N, N], float64."""
        shift = (self.deviations @ self.centre).double()
        return self._own + shift + shift[:, None] + self.centre.double().square().sum()

    def inners(self, matrix: Tensor) -> Tensor:
        """<C_n, matrix> for a matrix [k, k], [N], or for several [r, k, k], [N, r]."""
        packed = pack((matrix + matrix.mT) / 2).to(self.centre).movedim(-1, 0)  # [p] or [p, r]
        return self.deviations @ packed + self.centre @ packed

    def mean(self) -> Tensor:
        """Mean matrix, [k, k]."""
        return unpack(self.centre, self.size)

    def diagonals(self) -> Tensor:
        """Diagonals [N, k]."""
        own = torch.arange(self.size, device=self.centre.device)
        places = own * self.size - own * (own - 1) // 2
        return self.deviations[:, places] + self.centre[places]

    def matrices(self) -> Tensor:
        """All matrices in full, [N, k, k]."""
        return unpack(self.deviations + self.centre, self.size)

    def apply(self, v: Tensor) -> Tensor:
        """C_n v_n for v [N, k, c], [N, k, c], a few examples unpacked at a time."""
        some = max(1, 2**22 // self.size**2)
        parts = zip(self.deviations.split(some), v.split(some), strict=True)
        return torch.cat([unpack(d + self.centre, self.size) @ w for d, w in parts])

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_n w_rn C_n for weights [r, N], [r, k, k]."""
        total = weights @ self.deviations + weights.sum(1, keepdim=True) * self.centre
        return unpack(total, self.size)


@dataclass(frozen=True, eq=False)
class Outer:
    """C_n = R_nᵀ R_n with few rows, roots R [N, r, k]."""

    roots: Tensor

    @property
    def size(self) -> int:
        """Rows k of each matrix."""
        return self.roots.shape[2]

    @cached_property
    def _own(self) -> Tensor:
        double = self.roots.double()  # float32 products would blur small differences
        return squared_blocks(double, double)

    def gram(self) -> Tensor:
        """<C_n, C_m> = ‖R_n R_mᵀ‖², [N, N], float64."""
        return self._own

    def centred_gram(self) -> Tensor:
        """<C_n − C̄, C_m − C̄>, [N, N], float64."""
        return centred(self._own)

    def inners(self, matrix: Tensor) -> Tensor:
        """<C_n, matrix> for a matrix [k, k], [N], or for several [r, k, k], [N, r]."""
        if matrix.ndim == 3:
            return torch.stack([self.inners(own) for own in matrix], 1)
        return ((self.roots @ matrix.to(self.roots)) * self.roots).sum((1, 2))

    def mean(self) -> Tensor:
        """Mean matrix, [k, k]."""
        flat = self.roots.flatten(0, 1)
        return flat.T @ flat / len(self.roots)

    def diagonals(self) -> Tensor:
        """Diagonals [N, k]."""
        return self.roots.square().sum(1)

    def matrices(self) -> Tensor:
        """All matrices in full, [N, k, k]."""
        return self.roots.mT @ self.roots

    def apply(self, v: Tensor) -> Tensor:
        """C_n v_n for v [N, k, c], [N, k, c]."""
        return self.roots.mT @ (self.roots @ v)

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_n w_rn C_n for weights [r, N], [r, k, k]."""
        flat = self.roots.flatten(0, 1)
        each = weights.repeat_interleave(self.roots.shape[1], 1)
        return torch.stack([(flat * w[:, None]).T @ flat for w in each])


@dataclass(frozen=True, eq=False)
class Diagonals:
    """Diagonal matrices, values [N, k]."""

    values: Tensor

    @property
    def size(self) -> int:
        """Rows k of each matrix."""
        return self.values.shape[1]

    def centred_gram(self) -> Tensor:
        """<C_n − C̄, C_m − C̄>, [N, N], float64."""
        return summed_gram(self.values - self.values.mean(0))

    def gram(self) -> Tensor:
        """<C_n, C_m>, [N, N], float64."""
        return summed_gram(self.values)

    def inners(self, matrix: Tensor) -> Tensor:
        """<C_n, matrix> for a matrix [k, k], [N], or for several [r, k, k], [N, r]."""
        return self.values @ matrix.diagonal(dim1=-2, dim2=-1).to(self.values).movedim(-1, 0)

    def mean(self) -> Tensor:
        """Mean matrix, [k, k]."""
        return torch.diag(self.values.mean(0))

    def diagonals(self) -> Tensor:
        """Diagonals [N, k]."""
        return self.values

    def matrices(self) -> Tensor:
        """All matrices in full, [N, k, k]."""
        return torch.diag_embed(self.values)

    def apply(self, v: Tensor) -> Tensor:
        """C_n v_n for v [N, k, c], [N, k, c]."""
        return self.values[:, :, None] * v

    def weighted(self, weights: Tensor) -> Tensor:
        """Σ_n w_rn C_n for weights [r, N], [r, k, k]."""
        return torch.diag_embed(weights @ self.values)


def difference(first: BatchedSymmetric, second: BatchedSymmetric) -> BatchedSymmetric:
    """C_n − D_n of two batches."""
    if isinstance(first, Diagonals) and isinstance(second, Diagonals):
        return Diagonals(first.values - second.values)
    return Packed.of(first.matrices() - second.matrices())


def centred(gram: Tensor) -> Tensor:
    """Gram matrix of the same vectors less their mean."""
    return gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()


def cross_gram(first: BatchedSymmetric, second: BatchedSymmetric) -> Tensor:
    """<C_n, D_m> of two batches, [N, M], float64."""
    if first is second:
        return first.gram()
    if isinstance(first, Diagonals) or isinstance(second, Diagonals):
        return first.diagonals().double() @ second.diagonals().double().T
    if isinstance(first, Outer) and isinstance(second, Outer):
        return squared_blocks(first.roots, second.roots)
    pairs = (pack(stack.matrices()).split(COLUMNS, dim=1) for stack in (first, second))
    return torch.stack([(a @ b.T).double() for a, b in zip(*pairs, strict=True)]).sum(0)


def summed_gram(rows: Tensor) -> Tensor:
    """Gram matrix [N, N] of rows [N, p], float64, from products over COLUMNS entries at a time."""
    total = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)
    for part in rows.split(COLUMNS, dim=1):
        total += part @ part.T
    return total


def squared_blocks(first: Tensor, second: Tensor) -> Tensor:
    """‖R_n S_mᵀ‖_F² for R [N, r, k] and S [M, s, k], [N, M], float64; a few n at a time."""
    (_, r, k), (m, s, _) = first.shape, second.shape
    flat = second.reshape(m * s, k).T
    some = max(1, 2**22 // (r * m * s))
    found = [
        (part.reshape(-1, k) @ flat).square_().reshape(len(part), r, m, s).sum((1, 3)).double()
        for part in first.split(some)
    ]
    return torch.cat(found)


def pack(symmetric: Tensor) -> Tensor:
    """[..., k, k] symmetric -> [..., k(k+1)/2], off-diagonal entries times √2: keeps <,>."""
    k = symmetric.shape[-1]
    rows, columns = torch.triu_indices(k, k, device=symmetric.device)
    off = (rows != columns).to(symmetric) * (2**0.5 - 1) + 1
    return symmetric.flatten(-2)[..., rows * k + columns].mul_(off)


def unpack(packed: Tensor, k: int) -> Tensor:
    """Inverse of `pack`: [..., k(k+1)/2] -> [..., k, k]."""
    rows, columns = torch.triu_indices(k, k, device=packed.device)
    off = (rows != columns).to(packed) * (2**-0.5 - 1) + 1
    return (packed * off)[..., positions(k, packed.device)]


def positions(k: int, device: torch.device) -> Tensor:
    """[k, k] -> place of entry (r, c) in the packed upper triangle."""
    rows, columns = torch.triu_indices(k, k, device=device)
    places = torch.empty(k, k, dtype=torch.long, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised tensor with the dtype and device of `like`.

    On a CPU from NumPy, which asks Linux for large pages: a first write is then 4 times faster.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    return torch.from_numpy(np.empty(shape, dtype))
