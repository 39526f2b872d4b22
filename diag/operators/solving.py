"""Inverses and solves: factorise once, apply often."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from .forms import dense, to_dense
from .structures import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    by_columns,
)


@dataclass(frozen=True, eq=False)
class Inverse:
    """base⁻¹: applied by `solve`, and solved by applying base."""

    base: Operator

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return tuple(self.base.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return solve(self.base, v)


def inverse(operator: Operator) -> Operator:
    """Return operator⁻¹ in the operator's own structure where it has one, else an Inverse."""
    if isinstance(operator, Inverse):
        return operator.base
    if isinstance(operator, Kronecker):
        return Kronecker(torch.linalg.inv(operator.left), torch.linalg.inv(operator.right))
    if isinstance(operator, Diagonal):
        return Diagonal(1 / operator.diagonal)
    if isinstance(operator, BlockDiagonal):
        blocks = operator.blocks
        inverted = (
            torch.linalg.inv(blocks)
            if isinstance(blocks, Tensor)
            else [torch.linalg.inv(block) for block in blocks]
        )
        return BlockDiagonal(inverted, operator.order)
    return Inverse(operator)


def damp_blocks(operator: BlockDiagonal, damping: float) -> BlockDiagonal:
    """Return operator + damping·I as a BlockDiagonal."""
    damped = [b + damping * torch.eye(len(b)).to(b) for b in operator.blocks]
    stacked = torch.stack(damped) if isinstance(operator.blocks, Tensor) else damped
    return BlockDiagonal(stacked, operator.order)


def solve(operator: Operator, v: Tensor) -> Tensor:
    """Return operator⁻¹ v for v [d] or [d, k].

    Kronecker, block-diagonal, diagonal and low-rank structure is used, also under damping; any
    other operator is factorised densely (once per damping where it can keep the result).

    Raises: torch.linalg.LinAlgError for a singular operator.
    """
    return solver(operator, 0.0)(v)


def keep(operator: Operator, key: Any, compute: Callable[[], Any]) -> Any:
    """compute(), once per operator and key where the operator keeps things (`.kept`).

    A Dense forgets what it kept of a matrix that was changed in place.
    """
    kept = getattr(operator, "kept", None)
    if kept is None:
        return compute()
    if isinstance(operator, Dense):
        if operator.matrix.is_inference():  # it counts no changes
            return compute()
        if kept.setdefault("version", operator.matrix._version) != operator.matrix._version:
            kept.clear()
            kept["version"] = operator.matrix._version
    if key not in kept:
        kept[key] = compute()
    return kept[key]


def dense_inverse(operator: Operator, damping: float) -> Tensor | None:
    """(operator + damping·I)⁻¹ [d, d], or None where that is not positive definite.

    For many products with the inverse: one with a matrix is faster than a pair of triangular
    solves with a single column. Kept with the operator.
    """

    def compute() -> Tensor | None:
        root = cholesky(operator, damping)
        return None if root is None else torch.cholesky_solve(torch.eye(len(root)).to(root), root)

    return keep(operator, ("inverse", damping), compute)


def cholesky(operator: Operator, damping: float) -> Tensor | None:
    """Lower Cholesky factor [d, d] of operator + damping·I, None where there is none; kept."""

    def compute() -> Tensor | None:
        root, failed = torch.linalg.cholesky_ex(dense(Damped(operator, damping)))
        return None if failed else root

    return keep(operator, ("cholesky", damping), compute)


def solver(operator: Operator, damping: float) -> Callable[[Tensor], Tensor]:
    """Factorise operator + damping·I once; the function returned applies the inverse."""
    while isinstance(operator, Damped):
        damping += operator.damping
        operator = operator.base
    return keep(operator, ("solver", damping), lambda: _solver(operator, damping))


@singledispatch
def _solver(operator: Any, damping: float) -> Callable[[Tensor], Tensor]:
    return dense_solver(operator, damping)


def dense_solver(operator: Operator, damping: float) -> Callable[[Tensor], Tensor]:
    """Factorise operator + damping·I as a dense matrix, by Cholesky or else LU."""
    undone = getattr(operator, "kept", {}).get(("inverse", damping))
    if undone is not None:  # somebody paid for it already
        return lambda v: undone @ v
    root = cholesky(operator, damping)
    if root is not None:
        return lambda v: by_columns(lambda rows: torch.cholesky_solve(rows.T, root).T, v)
    factors = torch.linalg.lu_factor(dense(Damped(operator, damping)))  # symmetric, indefinite
    return lambda v: by_columns(lambda rows: torch.linalg.lu_solve(*factors, rows.T).T, v)


def solver_rule(kind: type) -> Callable:
    """Register how operators of a kind are factorised: (operator, damping) -> apply the inverse."""
    return _solver.register(kind)


@_solver.register
def _(operator: KroneckerSum, damping: float) -> Callable[[Tensor], Tensor]:
    if len(operator.left) == 1:
        return _solver(operator.terms[0], damping)
    return _solver(dense(operator), damping)


def damped_eigenvalues(values: Tensor, operator: Operator, damping: float) -> Tensor:
    """The damped values, to divide by. Raises: torch.linalg.LinAlgError where one is zero."""
    damped = values + damping
    if (damped == 0).any():
        raise torch.linalg.LinAlgError(
            f"{int((damped == 0).sum())} eigenvalues of a {type(operator).__name__} with damping "
            f"{damping:g} are zero"
        )
    return damped


@_solver.register
def _(operator: Diagonal, damping: float) -> Callable[[Tensor], Tensor]:
    inverted = Diagonal(1 / damped_eigenvalues(operator.diagonal, operator, damping))
    return lambda v: inverted @ v


@_solver.register
def _(operator: Kronecker, damping: float) -> Callable[[Tensor], Tensor]:
    left, U = torch.linalg.eigh(operator.left)
    right, V = torch.linalg.eigh(operator.right)
    values = damped_eigenvalues(torch.outer(left, right).reshape(-1), operator, damping)
    basis, back, inverted = Kronecker(U, V), Kronecker(U.T, V.T), Diagonal(1 / values)
    return lambda v: basis @ (inverted @ (back @ v))


@_solver.register
def _(operator: BlockDiagonal, damping: float) -> Callable[[Tensor], Tensor]:
    inverted = inverse(damp_blocks(operator, damping))
    return lambda v: inverted @ v


@_solver.register
def _(operator: LowRank, damping: float) -> Callable[[Tensor], Tensor]:
    """Woodbury: (V Vᵀ + λI)⁻¹ = (I − V (VᵀV + λI)⁻¹ Vᵀ) / λ; without damping it is singular."""
    if not damping:
        raise torch.linalg.LinAlgError("a low-rank operator is singular without damping")
    small = Damped(Dense(operator.factor.T @ operator.factor), damping)
    return lambda v: (v - operator.factor @ solve(small, operator.factor.T @ v)) / damping


@_solver.register
def _(operator: Inverse, damping: float) -> Callable[[Tensor], Tensor]:
    if not damping:
        return lambda v: operator.base @ v
    matrix = Dense(dense(operator))
    return _solver(matrix, damping)


@to_dense.register
def _(operator: Inverse) -> Tensor:
    inverted = inverse(operator.base)
    return (
        torch.linalg.inv(dense(operator.base))
        if isinstance(inverted, Inverse)
        else to_dense(inverted)
    )
