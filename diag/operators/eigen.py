"""Eigendecomposed structures: KroneckerEigen (in a Kronecker basis) and Spectral (low rank)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .forms import diagonal, to_dense
from .products import inner_rule
from .solving import _solver, damped_eigenvalues
from .structures import Kronecker, KroneckerSum, Map, by_columns, square


@dataclass(frozen=True, eq=False)
class KroneckerEigen:
    """(U ⊗ W) diag(vec S) (U ⊗ W)ᵀ: eigenvalues S [o, i] in an orthonormal Kronecker basis.

    left_basis U [o, o] and right_basis W [i, i] hold eigenvectors in their columns; scale is S.

    >>> KroneckerEigen(torch.eye(1), torch.eye(2), torch.tensor([[3.0, 4.0]])) @ torch.ones(2)
    tensor([3., 4.])
    """

    left_basis: Tensor
    right_basis: Tensor
    scale: Tensor

    shape = square(lambda self: self.scale.numel())

    def __matmul__(self, v: Tensor) -> Tensor:
        return _scaled(self, self.scale)(v)


def _scaled(operator: KroneckerEigen, scale: Tensor) -> Map:
    """V -> U (scale ∘ (Uᵀ M W)) Wᵀ for v = vec(M)."""
    U, W = operator.left_basis, operator.right_basis

    def apply(rows: Tensor) -> Tensor:
        turned = U.T @ rows.reshape(-1, *scale.shape) @ W
        return (U @ (scale * turned) @ W.T).reshape(len(rows), -1)

    return lambda v: by_columns(apply, v)


@dataclass(frozen=True, eq=False)
class Spectral:
    """V diag(values) Vᵀ with orthonormal columns V [d, r]: low rank with signs, values [r]."""

    basis: Tensor
    values: Tensor

    shape = square(lambda self: len(self.basis))

    def __matmul__(self, v: Tensor) -> Tensor:
        return by_columns(lambda rows: (rows @ self.basis * self.values) @ self.basis.T, v)


@to_dense.register
def _(operator: KroneckerEigen) -> Tensor:
    basis = torch.kron(operator.left_basis, operator.right_basis)
    return (basis * operator.scale.reshape(-1)) @ basis.T


@to_dense.register
def _(operator: Spectral) -> Tensor:
    return (operator.basis * operator.values) @ operator.basis.T


@diagonal.register
def _(operator: KroneckerEigen) -> Tensor:
    left, right = operator.left_basis.square(), operator.right_basis.square()
    return (left @ operator.scale @ right.T).reshape(-1)


@diagonal.register
def _(operator: Spectral) -> Tensor:
    return operator.basis.square() @ operator.values


@inner_rule(KroneckerEigen, KroneckerEigen)
def _(first: KroneckerEigen, second: KroneckerEigen) -> Tensor:
    if first is second:
        return first.scale.square().sum()
    left = (first.left_basis.T @ second.left_basis).square()
    right = (first.right_basis.T @ second.right_basis).square()
    return (first.scale * (left @ second.scale @ right.T)).sum()


@inner_rule(KroneckerEigen, Kronecker)
def _(first: KroneckerEigen, second: Kronecker) -> Tensor:
    U, W = first.left_basis, first.right_basis
    left = (U * (second.left @ U)).sum(0)  # diagonal of Uᵀ left U
    right = (W * (second.right @ W)).sum(0)
    return left @ first.scale @ right


@inner_rule(KroneckerEigen, KroneckerSum)
def _(first: KroneckerEigen, second: KroneckerSum) -> Tensor:
    U, W = first.left_basis, first.right_basis
    lefts = (U * (second.left @ U)).sum(1)  # [r, o]
    rights = (W * (second.right @ W)).sum(1)
    return ((lefts @ first.scale) * rights).sum()


@inner_rule(Spectral, Spectral)
def _(first: Spectral, second: Spectral) -> Tensor:
    overlaps = (first.basis.T @ second.basis).square()
    return first.values @ overlaps @ second.values


@_solver.register
def _(operator: KroneckerEigen, damping: float) -> Map:
    return _scaled(operator, 1 / damped_eigenvalues(operator.scale, operator, damping))


@_solver.register
def _(operator: Spectral, damping: float) -> Map:
    """(V D Vᵀ + λI)⁻¹ = V (D + λ)⁻¹ Vᵀ + (I − V Vᵀ)/λ; singular at λ = 0 unless V is square."""
    values, full = operator.values + damping, operator.basis.shape[0] == operator.basis.shape[1]
    if not (full or damping):
        raise torch.linalg.LinAlgError("a low-rank operator is singular without damping")
    if (values == 0).any():
        raise torch.linalg.LinAlgError(f"damping {damping:g} cancels an eigenvalue")
    if full:
        inverted = Spectral(operator.basis, 1 / values)
        return lambda v: inverted @ v
    added = Spectral(operator.basis, 1 / values - 1 / damping)
    return lambda v: v / damping + added @ v
