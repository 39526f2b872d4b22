"""Inverses and linear solves with operators; factorisations are kept with the operator."""

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
    Map,
    Operator,
    by_columns,
    square,
)


@dataclass(frozen=True, eq=False)
class Inverse:
    """Inverse of base: `@` solves with base, `solve` multiplies with it."""

    base: Operator

    shape = square(lambda self: self.base.shape[0])

    def __matmul__(self, v: Tensor) -> Tensor:
        return solve(self.base, v)


def inverse(operator: Operator) -> Operator:
    """The inverse in the operator's own structure where it has one, else as an Inverse."""
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


def solve(operator: Operator, v: Tensor) -> Tensor:
    """Solve operator x = v for v [d] or [d, k].

    By structure (Kronecker, block-diagonal, diagonal, low-rank; also damped), else by a dense
    factorisation, kept per damping.

    Raises: torch.linalg.LinAlgError for a singular operator.
    """
    return solver(operator, 0.0)(v)


def keep(operator: Operator, key: Any, compute: Callable[[], Any]) -> Any:
    """compute(), once per operator and key where the operator has a dict `.kept`.

    A Dense whose matrix was changed in place forgets what it kept.
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
    """(operator + damping·I)⁻¹ [d, d], kept; None where that is not positive definite.

    For many single columns: a product is faster than two triangular solves.
    """

    def compute() -> Tensor | None:
        root = cholesky(operator, damping)
        return None if root is None else torch.cholesky_solve(torch.eye(len(root)).to(root), root)

    return keep(operator, ("inverse", damping), compute)


def cholesky(operator: Operator, damping: float) -> Tensor | None:
    """Lower Cholesky factor [d, d] of operator + damping·I, kept; None where there is none."""

    def compute() -> Tensor | None:
        root, failed = torch.linalg.cholesky_ex(dense(Damped(operator, damping)))
        return None if failed else root

    return keep(operator, ("cholesky", damping), compute)


def solver(operator: Operator, damping: float) -> Map:
    """The function that applies (operator + damping·I)⁻¹, from one factorisation."""
    while isinstance(operator, Damped):
        damping += operator.damping
        operator = operator.base
    return keep(operator, ("solver", damping), lambda: _solver(operator, damping))


@singledispatch
def _solver(operator: Any, damping: float) -> Map:
    if isinstance(operator, KroneckerSum) and len(operator.left) == 1:
        return _solver(operator.terms[0], damping)
    return dense_solver(operator, damping)


def dense_solver(operator: Operator, damping: float) -> Map:
    """The same from a dense matrix, by Cholesky or else LU."""
    undone = getattr(operator, "kept", {}).get(("inverse", damping))
    if undone is not None:
        return lambda v: undone @ v
    root = cholesky(operator, damping)
    if root is not None:
        return lambda v: by_columns(lambda rows: torch.cholesky_solve(rows.T, root).T, v)
    factors = torch.linalg.lu_factor(dense(Damped(operator, damping)))  # symmetric, indefinite
    return lambda v: by_columns(lambda rows: torch.linalg.lu_solve(*factors, rows.T).T, v)


def solver_rule(kind: type) -> Callable:
    """Register the solver of a structure: (operator, damping) -> function applying the inverse."""
    return _solver.register(kind)


def damped_eigenvalues(values: Tensor, operator: Operator, damping: float) -> Tensor:
    """The values plus damping. Raises: torch.linalg.LinAlgError where one is zero."""
    damped = values + damping
    if (damped == 0).any():
        raise torch.linalg.LinAlgError(
            f"{int((damped == 0).sum())} eigenvalues of a {type(operator).__name__} with damping "
            f"{damping:g} are zero"
        )
    return damped


@_solver.register
def _(operator: Diagonal, damping: float) -> Map:
    inverted = Diagonal(1 / damped_eigenvalues(operator.diagonal, operator, damping))
    return lambda v: inverted @ v


@_solver.register
def _(operator: Kronecker, damping: float) -> Map:
    (left, U), (right, V) = (torch.linalg.eigh(side) for side in (operator.left, operator.right))
    values = damped_eigenvalues(torch.outer(left, right).reshape(-1), operator, damping)
    basis, back, inverted = Kronecker(U, V), Kronecker(U.T, V.T), Diagonal(1 / values)
    return lambda v: basis @ (inverted @ (back @ v))


@_solver.register
def _(operator: BlockDiagonal, damping: float) -> Map:
    damped = [b + damping * torch.eye(len(b)).to(b) for b in operator.blocks]
    stacked = torch.stack(damped) if isinstance(operator.blocks, Tensor) else damped
    inverted = inverse(BlockDiagonal(stacked, operator.order))
    return lambda v: inverted @ v


@_solver.register
def _(operator: LowRank, damping: float) -> Map:
    """Woodbury: (V Vᵀ + λI)⁻¹ = (I − V (VᵀV + λI)⁻¹ Vᵀ) / λ; without damping it is singular."""
    if not damping:
        raise torch.linalg.LinAlgError("a low-rank operator is singular without damping")
    small = Damped(Dense(operator.factor.T @ operator.factor), damping)
    return lambda v: (v - operator.factor @ solve(small, operator.factor.T @ v)) / damping


@_solver.register
def _(operator: Inverse, damping: float) -> Map:
    if not damping:
        return lambda v: operator.base @ v
    return _solver(dense(operator), damping)


@to_dense.register
def _(operator: Inverse) -> Tensor:
    inverted = inverse(operator.base)
    return (
        torch.linalg.inv(dense(operator.base))
        if isinstance(inverted, Inverse)
        else to_dense(inverted)
    )
