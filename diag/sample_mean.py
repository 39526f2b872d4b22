"""The exact block of a linear layer as a mean over examples, and all that follows from its Gram.

A pre-activation is linear in its weights, so with one row per example a layer's block is exactly

    C = (1/N) Σ_n C_n ⊗ a_n a_nᵀ,

C_n [out, out] the curvature of example n's loss with respect to the pre-activation, a_n [in+1] the
layer's input with 1 appended. Norms, errors, Kronecker singular values and sampling noise need only
inner products between these terms, never a d x d matrix.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diag.memory import empty
from diag.operators import (
    BlockDiagonal,
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
from diag.operators.forms import to_dense
from diag.operators.structures import by_columns
from diag.sampled import Sampled


@dataclass(frozen=True, eq=False)
class SampleMean(Sampled):
    """The operator (1/N) Σ_n C_n ⊗ a_n a_nᵀ, from a [N, i] and C [N, o, o] (each symmetric)."""

    a: Tensor
    C: Tensor
    kept: dict = field(default_factory=dict, repr=False)  # what was derived, for the next question

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.a)

    @property
    def factor_sizes(self) -> tuple[int, int]:
        """(o, i): the sizes of a Kronecker product's factors."""
        return self.C.shape[1], self.a.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """(o·i, o·i)."""
        d = self.C.shape[1] * self.a.shape[1]
        return (d, d)

    def __matmul__(self, v: Tensor) -> Tensor:
        o, i = self.factor_sizes

        def apply(rows: Tensor) -> Tensor:
            projected = rows.reshape(-1, o, i) @ self.a.T  # [k, o, N]
            bent = torch.einsum("npo,kon->kpn", self.C, projected)
            return (bent @ self.a / self.n).reshape(-1, o * i)

        return by_columns(apply, v)

    @cached_property
    def left_mean(self) -> Tensor:
        """G = mean of C_n, [o, o]."""
        return self.C.mean(0)

    @cached_property
    def right_mean(self) -> Tensor:
        """A = mean of a_n a_nᵀ, [i, i]."""
        return self.a.T @ self.a / self.n

    @cached_property
    def packed_left(self) -> Tensor:
        """Each C_n as a vector of its upper triangle with <C_n, C_m> kept, [N, o(o+1)/2]."""
        return pack(self.C)

    @cached_property
    def packed_right(self) -> Tensor:
        """Each a_n a_nᵀ as such a vector, [N, i(i+1)/2]."""
        rows, columns = torch.triu_indices(self.a.shape[1], self.a.shape[1])
        off = (rows != columns).to(self.a) * (2**0.5 - 1) + 1
        return self.a[:, rows] * self.a[:, columns] * off

    @cached_property
    def gram_left(self) -> Tensor:
        """<C_n, C_m>, [N, N]."""
        return self.packed_left @ self.packed_left.T

    @cached_property
    def gram_right(self) -> Tensor:
        """<a_n a_nᵀ, a_m a_mᵀ> = (a_n·a_m)², [N, N]."""
        return (self.a @ self.a.T).square()

    @property
    def gram(self) -> Tensor:
        """Inner products of the terms C_n ⊗ a_n a_nᵀ, [N, N]."""
        return keep(self, "gram", lambda: self.gram_left * self.gram_right)

    def inners(self, other: Operator) -> Tensor:
        """<C_n ⊗ a_n a_nᵀ, other> for every example, [N], never forming [d, d] of the terms."""
        a, C = self.a, self.C
        if isinstance(other, Kronecker):
            return (C.flatten(1) @ other.left.flatten()) * ((a @ other.right) * a).sum(1)
        if isinstance(other, KroneckerSum):
            return torch.stack([self.inners(term) for term in other.terms]).sum(0)
        if isinstance(other, Diagonal):
            weights = other.diagonal.reshape(self.factor_sizes)
            return (C.diagonal(dim1=1, dim2=2) * (a.square() @ weights.T)).sum(1)
        if isinstance(other, BlockDiagonal) and self._per_output(other):
            quadratic = torch.einsum("oij,ni,nj->no", other.blocks, a, a)
            return (C.diagonal(dim1=1, dim2=2) * quadratic).sum(1)
        if isinstance(other, LowRank):
            o, i = self.factor_sizes
            projected = torch.einsum("oik,ni->nok", other.factor.reshape(o, i, -1), a)
            return torch.einsum("nok,nop,npk->n", projected, C, projected)
        o, i = self.factor_sizes
        matrix = dense(other).reshape(o, i, o, i)
        halfway = torch.einsum("nj,oipj->noip", a, matrix)
        return torch.einsum("noip,ni,nop->n", halfway, a, C)

    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """u·(C_n ⊗ a_n a_nᵀ)v for every example, [N], for u and v [d]."""
        o, i = self.factor_sizes
        first, second = (self.a @ w.reshape(o, i).T for w in (u, v))  # [N, o]
        return torch.einsum("no,nop,np->n", first, self.C, second)

    def _per_output(self, other: BlockDiagonal) -> bool:
        o, i = self.factor_sizes
        return (
            other.order is None
            and isinstance(other.blocks, Tensor)
            and other.blocks.shape == (o, i, i)
        )

    @cached_property
    def kronecker_svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Singular values [r] of the rearranged block, and weights x, y [N, r] of its vectors.

        The rearrangement (Van Loan and Pitsianis 1993) of C is PᵀQ/N with rows P_n = vec C_n and
        Q_n = vec a_n a_nᵀ. With thin factorisations Pᵀ = U R_P and Qᵀ = V R_Q its singular values
        are those of R_P R_Qᵀ/N; unlike roots of eigenvalues of Gram matrices, these keep small ones
        to full accuracy. Returns left [r, o(o+1)/2] and right vectors packed as `pack` does.
        """
        U, R_P = _thin(self.packed_left.T)
        V, R_Q = _thin(self.packed_right.T)
        left, values, right = torch.linalg.svd(R_P @ R_Q.T / self.n, full_matrices=False)
        return values, (U @ left).T, right @ V.T


def _thin(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Reduced QR of a tall matrix; a wide one is its own R."""
    if tall.shape[0] <= tall.shape[1]:
        return torch.eye(len(tall)).to(tall), tall
    return torch.linalg.qr(tall)


def pack(symmetric: Tensor) -> Tensor:
    """[..., k, k] symmetric -> [..., k(k+1)/2], off-diagonal entries times √2: keeps <,>."""
    k = symmetric.shape[-1]
    rows, columns = torch.triu_indices(k, k)
    off = (rows != columns).to(symmetric) * (2**0.5 - 1) + 1
    return symmetric[..., rows, columns] * off


def unpack(packed: Tensor, k: int) -> Tensor:
    """Inverse of `pack`: [..., k(k+1)/2] -> [..., k, k]."""
    rows, columns = torch.triu_indices(k, k)
    off = (rows != columns).to(packed) * (2**-0.5 - 1) + 1
    matrix = packed.new_empty(*packed.shape[:-1], k, k)
    matrix[..., rows, columns] = packed * off
    matrix[..., columns, rows] = packed * off
    return matrix


@to_dense.register
def _(operator: SampleMean) -> Tensor:
    """One product of packed halves, [o(o+1)/2, N] x [N, i(i+1)/2], then re-ordered.

    Both factors are symmetric, so a quarter of the arithmetic of [o², N] x [N, i²] is enough.
    """
    o, i = operator.factor_sizes
    rows, columns = torch.triu_indices(o, o, device=operator.a.device)
    first, second = torch.triu_indices(i, i, device=operator.a.device)
    products = _taken(operator.a, first).mul_(_taken(operator.a, second))
    halves = empty(products, len(rows), len(first))
    torch.mm(operator.C[:, rows, columns].T, products, out=halves).div_(operator.n)
    tiles = _taken(halves, _positions(i, halves.device).flatten()).view(-1, i, i)
    matrix = empty(tiles, o, i, o, i)
    view = matrix.transpose(1, 2)  # [o, o, i, i]
    view[rows, columns] = tiles
    view[columns, rows] = tiles  # each tile is symmetric: the one below needs no transpose
    return matrix.reshape(o * i, o * i)


def _taken(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns], in memory from `empty`."""
    found = empty(matrix, len(matrix), len(columns))
    return torch.index_select(matrix, 1, columns, out=found)


def _positions(k: int, device: torch.device) -> Tensor:
    """[k, k] -> place of entry (r, c) in the packed upper triangle."""
    rows, columns = torch.triu_indices(k, k, device=device)
    places = torch.empty(k, k, dtype=torch.long, device=device)
    places[rows, columns] = places[columns, rows] = torch.arange(len(rows), device=device)
    return places


@diagonal.register
def _(operator: SampleMean) -> Tensor:
    weights = operator.C.diagonal(dim1=1, dim2=2)
    return (weights.T @ operator.a.square() / operator.n).reshape(-1)


@inner_rule(SampleMean, SampleMean)
def _(first: SampleMean, second: SampleMean) -> Tensor:
    if first is second:
        return first.gram.mean()
    lefts = first.C.flatten(1) @ second.C.flatten(1).T
    return (lefts * (first.a @ second.a.T).square()).mean()


def _mean_inner(first: SampleMean, second: Operator) -> Tensor:
    return first.inners(second).mean()


for _structure in (Kronecker, KroneckerSum, Diagonal, BlockDiagonal, LowRank):
    inner_rule(SampleMean, _structure)(_mean_inner)
