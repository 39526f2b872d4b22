"""Kronecker terms: the exact block (1/N) Σ_n C_n ⊗ a_n a_nᵀ of a layer with one row per example.

C_n [out, out] is the curvature of example n's loss with respect to the pre-activation W_bar a_n,
linear in W_bar; a_n [in+1] is the layer input with 1 appended.
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import (
    BlockDiagonal,
    Damped,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    dense,
    diagonal,
    inner_rule,
    keep,
)
from ..operators.batched import (
    BatchedSymmetric,
    Diagonals,
    Outer,
    Packed,
    centred,
    cross_gram,
    empty,
    pack,
    positions,
    unpack,
)
from ..operators.dtypes import made_of
from ..operators.eigen import KroneckerEigen, Spectral
from ..operators.forms import to_dense
from ..operators.structures import by_columns, square
from .per_example import PerExampleTerms, mean_inner

THIN_UP_TO = 2**24  # entries of the packed terms up to which they are factorised themselves


class KroneckerTerms(PerExampleTerms):
    """Operator (1/N) Σ_n C_n ⊗ a_n a_nᵀ from a [N, i] and C, a BatchedSymmetric or [N, o, o]."""

    def __init__(self, a: Tensor, C: Tensor | BatchedSymmetric) -> None:
        self.a = a
        self.left: BatchedSymmetric = Packed.of(C) if isinstance(C, Tensor) else C
        self.kept = {}

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.a)

    @property
    def C(self) -> Tensor:
        """Every C_n in full, [N, o, o]; large for wide layers."""
        return self.left.matrices()

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """(o, i): the sizes of a Kronecker product's factors."""
        return self.left.size, self.a.shape[1]

    shape = square(lambda self: self.left.size * self.a.shape[1])

    def __matmul__(self, v: Tensor) -> Tensor:
        o, i = self.factor_sizes

        def apply(rows: Tensor) -> Tensor:
            projected = rows.reshape(-1, o, i) @ self.a.T  # [k, o, N]
            bent = self.left.apply(projected.movedim(2, 0).mT).movedim(0, 2)  # [o, k, N]
            return (bent @ self.a / self.n).movedim(1, 0).reshape(-1, o * i)

        return by_columns(apply, v)

    @cached_property
    def left_mean(self) -> Tensor:
        """G = mean of C_n, [o, o]."""
        return self.left.mean()

    @cached_property
    def right_mean(self) -> Tensor:
        """A = mean of a_n a_nᵀ, [i, i]."""
        return self.a.T @ self.a / self.n

    @cached_property
    def gram_left(self) -> Tensor:
        """<C_n, C_m>, [N, N]."""
        return self.left.gram()

    @cached_property
    def gram_right(self) -> Tensor:
        """<a_n a_nᵀ, a_m a_mᵀ> = (a_n·a_m)², [N, N]."""
        a = self.a.double()
        return (a @ a.T).square()

    @property
    def gram(self) -> Tensor:
        """Inner products of the terms C_n ⊗ a_n a_nᵀ, [N, N]."""
        return keep(self, "gram", lambda: self.gram_left * self.gram_right)

    def inners(self, other: Operator) -> Tensor:
        """<C_n ⊗ a_n a_nᵀ, other> for every example, [N]."""
        a, (o, i) = self.a, self.factor_sizes
        if isinstance(other, Kronecker):
            return self.left.inners(other.left) * ((a @ other.right.to(a)) * a).sum(1)
        if isinstance(other, KroneckerSum):
            return self.inners_by_term(other).sum(1)
        if isinstance(other, Diagonal):
            weights = other.diagonal.reshape(o, i).to(a)
            return (self.left.diagonals() * (a.square() @ weights.T)).sum(1)
        if isinstance(other, KroneckerTerms):
            across = (a.double() @ other.a.double().T).square()
            return (cross_gram(self.left, other.left) * across).mean(1)
        if isinstance(other, BlockDiagonal) and self._per_output(other):
            return (self.left.diagonals() * _quadratics(a, other.blocks)).sum(1)
        if isinstance(other, LowRank | Spectral):
            basis = other.factor if isinstance(other, LowRank) else other.basis
            projected = torch.einsum("oik,ni->nok", basis.reshape(o, i, -1).to(a), a)
            squares = (projected * self.left.apply(projected)).sum(1)
            return squares.sum(1) if isinstance(other, LowRank) else squares @ other.values.to(a)
        if isinstance(other, KroneckerEigen):
            U, W, scale = (t.to(a) for t in (other.left_basis, other.right_basis, other.scale))
            bent = (U * self.left.apply(U.expand(self.n, -1, -1))).sum(1)  # u·C_n u, [N, o]
            return (bent * ((a @ W).square() @ scale.T)).sum(1)
        if isinstance(other, Damped):
            traces = self.left.diagonals().sum(1) * a.square().sum(1)
            return self.inners(other.base) + other.damping * traces
        matrix = dense(other).reshape(o, i, o, i).to(a)
        halfway = torch.einsum("nj,oipj->noip", a, matrix)
        return torch.einsum("noip,ni,nop->n", halfway, a, self.C)

    def inners_by_term(self, other: KroneckerSum) -> Tensor:
        """<C_n ⊗ a_n a_nᵀ, left_r ⊗ right_r> for every example and term, [N, r]."""
        right = [((self.a @ own.to(self.a)) * self.a).sum(1) for own in other.right]
        return self.left.inners(other.left) * torch.stack(right, 1)

    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """u·(C_n ⊗ a_n a_nᵀ)v for every example, [N], for u and v [d]."""
        o, i = self.factor_sizes
        first, second = (self.a @ w.reshape(o, i).to(self.a).T for w in (u, v))  # [N, o]
        return (first * self.left.apply(second[:, :, None])[:, :, 0]).sum(1)

    def _per_output(self, other: BlockDiagonal) -> bool:
        i = self.a.shape[1]
        return other.order is None and all(b.shape == (i, i) for b in other.blocks)

    @property
    def column_gram(self) -> Tensor:
        """Gram matrix of the columns r_nk ⊗ a_n / √N, [N·k, N·k], float64, for `left` as Outer."""
        assert isinstance(self.left, Outer)
        flat, k = self.left.roots.flatten(0, 1), self.left.roots.shape[1]
        inputs = (self.a @ self.a.T).repeat_interleave(k, 0).repeat_interleave(k, 1)
        return ((flat @ flat.T) * inputs).double() / self.n

    @cached_property
    def kronecker_svd(self) -> "KroneckerSVD":
        """Singular values and vectors of the rearranged block (Van Loan and Pitsianis 1993)."""
        small = self.n * max(self.left.size, self.a.shape[1]) ** 2 <= THIN_UP_TO
        return _by_thin_factors(self) if small else _by_gram(self)

    def covariance_square(self) -> float:
        """‖C − G ⊗ A‖², from C − G ⊗ A = mean_n dC_n ⊗ dA_n without cancellation."""

        def compute() -> float:
            return (self.left.centred_gram() * centred(self.gram_right)).mean().item()

        return keep(self, "covariance", compute)

    def covariance_inner(self, other: Kronecker) -> float:
        """<C − G ⊗ A, other>, the covariance over examples of the factors' inner products."""
        left = self.left.inners(other.left).double()
        right = ((self.a @ other.right.to(self.a)) * self.a).sum(1).double()
        return ((left - left.mean()) * (right - right.mean())).mean().item()


made_of(KroneckerTerms, "a", "left")
made_of(Packed, "centre", "deviations", "size")
made_of(Outer, "roots")
made_of(Diagonals, "values")


def _quadratics(a: Tensor, blocks: Tensor | Sequence[Tensor]) -> Tensor:
    """a_n·block_o a_n for every example and block, [N, o]."""
    some = max(1, 2**22 // a.numel())
    parts = [torch.stack(list(blocks[j : j + some])) for j in range(0, len(blocks), some)]
    return torch.cat([((a @ part.to(a)) * a).sum(2) for part in parts]).T


class KroneckerSVD(NamedTuple):
    """Rearranged C = Σ_k values_k vec(left_k) vec(right_k)ᵀ, values [r] descending.

    left(rank): [rank, o, o], right(rank): [rank, i, i].
    """

    values: Tensor
    left: Callable[[int], Tensor]
    right: Callable[[int], Tensor]


def _by_thin_factors(mean: KroneckerTerms) -> KroneckerSVD:
    """SVD of PᵀQ/N, rows P_n = vec C_n, Q_n = vec a_n a_nᵀ, by QR: small values keep accuracy."""
    o, i = mean.factor_sizes
    U, R_P = _thin(pack(mean.C).T)
    V, R_Q = _thin(pack(mean.a[:, :, None] * mean.a[:, None, :]).T)
    left, values, right = torch.linalg.svd(R_P @ R_Q.T / mean.n, full_matrices=False)
    return KroneckerSVD(
        values,
        lambda rank: unpack((U @ left[:, :rank]).T, o),
        lambda rank: unpack(right[:rank] @ V.T, i),
    )


def _by_gram(mean: KroneckerTerms) -> KroneckerSVD:
    """The same from N x N Gram matrices: values to 1e-8 of the largest."""
    (P, R_P), (Q, R_Q) = (_gram_root(gram) for gram in (mean.gram_left, mean.gram_right))
    left, values, right = torch.linalg.svd(R_P @ R_Q.T / mean.n, full_matrices=False)
    return KroneckerSVD(
        values,
        lambda rank: mean.left.weighted((P @ left[:, :rank]).T.to(mean.a)),
        lambda rank: Outer(mean.a[:, None]).weighted((Q @ right[:rank].T).T.to(mean.a)),
    )


def _gram_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R [m, N] with K = RᵀR, and W [N, m] such that rows = W R makes WᵀK W = I."""
    values, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    sound = values > values[-1] * len(gram) * torch.finfo(values.dtype).eps
    roots, vectors = values[sound].sqrt(), vectors[:, sound]
    return vectors / roots, (vectors * roots).T


def _thin(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR of a tall matrix; a wide one is its own R."""
    if tall.shape[0] <= tall.shape[1]:
        return torch.eye(len(tall)).to(tall), tall
    return torch.linalg.qr(tall)


@to_dense.register
def _(operator: KroneckerTerms) -> Tensor:
    """One product of packed halves, [o(o+1)/2, N] x [N, i(i+1)/2], then re-ordered."""
    if isinstance(operator.left, Diagonals):
        return torch.block_diag(*output_blocks(operator))
    o, i = operator.factor_sizes
    rows, columns = torch.triu_indices(o, o, device=operator.a.device)
    first, second = torch.triu_indices(i, i, device=operator.a.device)
    products = _selected(operator.a, first).mul_(_selected(operator.a, second))
    halves = empty(products, len(rows), len(first))
    torch.mm(operator.C[:, rows, columns].T, products, out=halves).div_(operator.n)
    tiles = _selected(halves, positions(i, halves.device).flatten()).view(-1, i, i)
    matrix = empty(tiles, o, i, o, i)
    view = matrix.transpose(1, 2)  # [o, o, i, i]
    view[rows, columns] = tiles
    view[columns, rows] = tiles  # each tile is symmetric: the one below needs no transpose
    return matrix.reshape(o * i, o * i)


def output_blocks(mean: KroneckerTerms) -> Tensor:
    """Exact sub-blocks of the output neurons, mean_n C_n[o, o] a_n a_nᵀ, [o, i, i]."""
    weights = mean.left.diagonals().T  # [o, N]
    return (weights[:, None, :] * mean.a.T) @ mean.a / mean.n


def _selected(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns], in memory from `empty`."""
    found = empty(matrix, len(matrix), len(columns))
    return torch.index_select(matrix, 1, columns, out=found)


@diagonal.register
def _(operator: KroneckerTerms) -> Tensor:
    weights = operator.left.diagonals()
    return (weights.T @ operator.a.square() / operator.n).reshape(-1)


_KNOWN = (Kronecker, KroneckerSum, KroneckerEigen, Diagonal, BlockDiagonal, LowRank, Spectral)
inner_rule(KroneckerTerms, KroneckerTerms, *_KNOWN, Damped)(mean_inner)
