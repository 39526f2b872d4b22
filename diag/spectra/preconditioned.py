"""Extreme eigenvalues of a truth preconditioned by an approximation, B^-½ (C + λI) B^-½."""

from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from ..operators import (
    BlockDiagonal,
    Damped,
    Diagonal,
    Inverse,
    Kronecker,
    KroneckerSum,
    Operator,
    dense,
    dense_inverse,
    solver,
)
from ..operators.eigen import KroneckerEigen
from ..operators.structures import Map
from .extreme_eigenpairs import DENSE_UP_TO, arpack

INVERTED_UP_TO = 6000  # up to here many products with a dense inverse are fastest
TOLERANCE = 1e-4  # relative residual of a Lanczos pair; bounds the error of its eigenvalue


class Root(NamedTuple):
    """B^½ and B^-½ as functions of [d] or [d, k]; `like` has their dtype and device."""

    apply: Map
    inverse: Map
    like: Tensor


class PencilPair(NamedTuple):
    """An eigenvalue of B^-½ (C + λI) B^-½ and x = B^-½ v, with x·(C + λI)x = value."""

    value: float
    x: Tensor


@singledispatch
def square_root(operator: Any, damping: float) -> Root:
    """Symmetric square root of operator + damping·I and its inverse.

    Raises: NotPositiveDefiniteError when the damped operator is not positive definite.
    """
    if isinstance(operator, KroneckerSum) and len(operator.left) == 1:
        return square_root(operator.terms[0], damping)
    values, basis = torch.linalg.eigh(dense(operator))
    return _root(values + damping, lambda v: basis @ v, lambda v: basis.T @ v)


@square_root.register
def _(operator: Diagonal, damping: float) -> Root:
    return _root(operator.diagonal + damping, lambda v: v, lambda v: v)


@square_root.register
def _(operator: Kronecker, damping: float) -> Root:
    (left, U), (right, V) = (torch.linalg.eigh(side) for side in (operator.left, operator.right))
    return square_root(KroneckerEigen(U, V, torch.outer(left, right)), damping)


@square_root.register
def _(operator: KroneckerEigen, damping: float) -> Root:
    basis = Kronecker(operator.left_basis, operator.right_basis)
    back = Kronecker(operator.left_basis.T.contiguous(), operator.right_basis.T.contiguous())
    values = operator.scale.reshape(-1) + damping
    return _root(values, lambda v: basis @ v, lambda v: back @ v)


@square_root.register
def _(operator: BlockDiagonal, damping: float) -> Root:
    if not isinstance(operator.blocks, Tensor):
        return square_root(dense(operator), damping)
    values, bases = torch.linalg.eigh(operator.blocks)
    basis = BlockDiagonal(bases, operator.order)
    back = BlockDiagonal(bases.mT.contiguous(), operator.order)
    spread = values.flatten() + damping
    if operator.order is not None:  # from the blocks' order to the coordinates'
        spread = spread[operator.order.argsort()]
    return _root(spread, lambda v: basis @ v, lambda v: back @ v)


@square_root.register
def _(operator: Inverse, damping: float) -> Root:
    if damping:
        return square_root(dense(operator), damping)
    root = square_root(operator.base, 0.0)
    return Root(root.inverse, root.apply, root.like)


@square_root.register
def _(operator: Damped, damping: float) -> Root:
    return square_root(operator.base, damping + operator.damping)


class NotPositiveDefiniteError(ValueError):
    """Raised where a damped matrix has an eigenvalue that is not positive."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} is not positive definite; a larger damping makes it so")


def _root(values: Tensor, basis: Map, back: Map) -> Root:
    if values.min() <= 0:
        raise NotPositiveDefiniteError("the damped approximation")
    up, down = Diagonal(values.sqrt()), Diagonal(values.rsqrt())
    return Root(lambda v: basis(up @ back(v)), lambda v: basis(down @ back(v)), values)


def preconditioned_extremes(
    truth: Operator, damping: float, root: Root
) -> tuple[PencilPair, PencilPair]:
    """Least and greatest eigenpairs of B^-½ (C + damping·I) B^-½, given B's root.

    By full decomposition up to d = 400, else by Lanczos: the greatest from products with C, the
    least as the greatest of the inverse.

    Raises: NotPositiveDefiniteError where C + damping·I is not positive definite.
    """
    d = truth.shape[0]
    if d <= DENSE_UP_TO:
        matrix = root.inverse(root.inverse(dense(Damped(truth, damping))).T)
        values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
        least, greatest = (
            PencilPair(values[at].item(), root.inverse(vectors[:, at])) for at in (0, -1)
        )
    else:
        undo = _inverse(truth, damping)
        damped = Damped(truth, damping)
        greatest = _lanczos(lambda v: root.inverse(damped @ root.inverse(v)), d, root)
        inverse = _lanczos(lambda v: root.apply(undo(root.apply(v))), d, root)
        # the pair's x belongs to B^-½ v of the same v, whichever matrix v was found from
        least = PencilPair(1 / inverse.value, inverse.x)
    if least.value <= 0:
        raise NotPositiveDefiniteError(f"C + {damping:g} I")
    return least, greatest


def _inverse(truth: Operator, damping: float) -> Map:
    """The function (C + damping·I)⁻¹, from a dense inverse up to d = INVERTED_UP_TO."""
    if truth.shape[0] > INVERTED_UP_TO:
        return solver(truth, damping)
    undone = dense_inverse(truth, damping)
    if undone is None:
        raise NotPositiveDefiniteError(f"C + {damping:g} I")
    return lambda v: undone @ v


def _lanczos(product: Map, d: int, root: Root) -> PencilPair:
    """Greatest eigenpair of a symmetric product, by ARPACK from a fixed start vector."""

    def matvec(v: np.ndarray) -> np.ndarray:
        column = torch.from_numpy(np.ascontiguousarray(v).reshape(-1)).to(root.like)
        return product(column).cpu().numpy()

    operator = LinearOperator((d, d), matvec=matvec, dtype=np.float64)
    start = np.random.default_rng(d).standard_normal(d)
    values, vectors = arpack(operator, 1, start, TOLERANCE)
    vector = torch.from_numpy(vectors[:, 0].copy()).to(root.like)
    return PencilPair(values[0].item(), root.inverse(vector))
