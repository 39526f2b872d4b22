"""Eigenvalues of an operator: all from structure, the extreme ones by Lanczos, their density."""

from functools import singledispatch
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, aslinearoperator, eigsh
from torch import Tensor

from diag.operators import (
    BUDGET,
    BlockDiagonal,
    Damped,
    Diagonal,
    Inverse,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    dense,
    like,
    to_scipy,
)
from diag.probes import products
from diag.quadrature import SpectralDensity, spectral_density, spectral_sum

__all__ = [
    "Eigenpairs",
    "NotConvergedError",
    "SpectralDensity",
    "bottom_eigenpairs",
    "eigenvalues",
    "eigenvalues_in_any_order",
    "gram_eigenvalues",
    "spectral_density",
    "spectral_sum",
    "top_eigenpairs",
]

DENSE_UP_TO = 400  # below this a full decomposition is faster than Lanczos
SEEDED = "rng" in signature(eigsh).parameters  # SciPy 1.17 on; before, ARPACK seeds itself


def eigenvalues(operator: Operator) -> Tensor:
    """All eigenvalues [d], ascending; from structure where it has one, else of the dense matrix.

    Kronecker: products of the factors' eigenvalues; low rank: those of its Gram matrix and zeros;
    block-diagonal: the blocks'; diagonal, damped, inverse: as they say.

    Raises: ValueError where a dense matrix over the memory budget (4 GiB) would be needed.

    >>> eigenvalues(Kronecker(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))).tolist()
    [1.0, 1.0, 3.0, 3.0]
    """
    return eigenvalues_in_any_order(operator).sort().values


@singledispatch
def eigenvalues_in_any_order(operator: Any) -> Tensor:
    """All eigenvalues [d], unsorted; a structure registers its own way here."""
    _check_budget(operator)
    return torch.linalg.eigvalsh(dense(operator))


@eigenvalues_in_any_order.register
def _(operator: Diagonal) -> Tensor:
    return operator.diagonal


@eigenvalues_in_any_order.register
def _(operator: Kronecker) -> Tensor:
    factors = [torch.linalg.eigvalsh(factor) for factor in (operator.left, operator.right)]
    return torch.outer(*factors).flatten()


@eigenvalues_in_any_order.register
def _(operator: KroneckerSum) -> Tensor:
    if len(operator.left) == 1:
        return eigenvalues_in_any_order(operator.terms[0])
    _check_budget(operator)
    return torch.linalg.eigvalsh(dense(operator))


@eigenvalues_in_any_order.register
def _(operator: BlockDiagonal) -> Tensor:
    return torch.cat([torch.linalg.eigvalsh(block) for block in operator.blocks])


@eigenvalues_in_any_order.register
def _(operator: LowRank) -> Tensor:
    return gram_eigenvalues(operator.factor)


@eigenvalues_in_any_order.register
def _(operator: Damped) -> Tensor:
    return eigenvalues_in_any_order(operator.base) + operator.damping


@eigenvalues_in_any_order.register
def _(operator: Inverse) -> Tensor:
    return 1 / eigenvalues_in_any_order(operator.base)


def _check_budget(operator: Operator) -> None:
    d = operator.shape[0]
    if 8 * d * d > BUDGET:
        raise ValueError(
            f"all {d} eigenvalues of a {type(operator).__name__} need its dense matrix, "
            f"{8 * d * d / 2**30:.1f} GiB, over the budget of {BUDGET / 2**30:.1f} GiB; use "
            f"top_eigenpairs or bottom_eigenpairs with k <= d / 4, spectral_density or spectral_sum"
        )


def gram_eigenvalues(factor: Tensor) -> Tensor:
    """Eigenvalues [d] of F Fᵀ for F [d, k], ascending, by way of Fᵀ F where k < d."""
    d, k = factor.shape
    small = LowRank(factor if d <= k else factor.T)
    values = torch.linalg.eigvalsh(dense(small)).clamp(min=0)  # rounding below zero
    return torch.cat([values.new_zeros(d - len(values)), values])


class Eigenpairs(NamedTuple):
    """values [k], unit vectors [d, k] as columns, and residuals ‖Cv - λv‖ [k] of each pair."""

    values: Tensor
    vectors: Tensor
    residuals: Tensor


class NotConvergedError(ArithmeticError):
    """Lanczos did not reach its tolerance."""


def top_eigenpairs(
    operator: Operator, k: int, tolerance: float | None = None, iterations: int = 1000
) -> Eigenpairs:
    """The k algebraically greatest eigenvalues, descending, each as often as it occurs.

    By full decomposition up to d = 400 or for k > d / 4, else by implicitly restarted Lanczos
    (ARPACK) from a fixed start vector. One Krylov space holds one vector of each eigenspace, so
    the search goes on, with what was found deflated, until nothing as great is left.

    tolerance: of the residuals, relative to |λ|; by default the root of the dtype's precision.
    iterations: restarts allowed.
    Raises: ValueError for k outside [1, d]; NotConvergedError.
    Source: Lehoucq, Sorensen and Yang 1998 (ARPACK users' guide).

    >>> top_eigenpairs(Diagonal(torch.tensor([1.0, -7.0, 3.0])), k=2).values.tolist()
    [3.0, 1.0]
    """
    return _eigenpairs(operator, k, 1, tolerance, iterations)


def bottom_eigenpairs(
    operator: Operator, k: int, tolerance: float | None = None, iterations: int = 1000
) -> Eigenpairs:
    """The k algebraically least eigenvalues, ascending; otherwise as `top_eigenpairs`.

    >>> bottom_eigenpairs(Diagonal(torch.tensor([1.0, -7.0, 3.0])), k=1).values.tolist()
    [-7.0]
    """
    return _eigenpairs(operator, k, -1, tolerance, iterations)


def _eigenpairs(
    operator: Operator, k: int, sign: int, tolerance: float | None, iterations: int
) -> Eigenpairs:
    """The top pairs of sign·operator, with the sign taken off their values."""
    d, entries = operator.shape[0], like(operator)
    if not 1 <= k <= d:
        raise ValueError(f"k must be in [1, d] = [1, {d}], not {k}")
    tolerance = torch.finfo(entries.dtype).eps ** 0.5 if tolerance is None else tolerance
    if d <= DENSE_UP_TO or 4 * k > d:
        _check_budget(operator)
        identity = torch.eye(d, dtype=torch.float64, device=entries.device)
        values, vectors = torch.linalg.eigh(sign * products(operator, identity))
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    else:  # ARPACK works in float64, whatever the operator's dtype
        found = _greatest(np.float64(sign) * to_scipy(operator), k, tolerance, iterations)
        values, vectors = (torch.from_numpy(part.copy()).to(entries.device) for part in found)
    values = sign * values
    residuals = (products(operator, vectors) - values * vectors).norm(dim=0)
    return Eigenpairs(*(part.to(entries) for part in (values, vectors, residuals)))


def _greatest(
    matrix: LinearOperator, k: int, tolerance: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greatest eigenvalues [k], descending, and vectors [d, k], with all copies of each."""
    d = matrix.shape[0]
    generator = np.random.default_rng(d)
    start = generator.standard_normal(d)
    if not (matrix @ start).any():  # the zero matrix, on which ARPACK gives up
        return np.zeros(k), np.eye(d, k)
    values, vectors = _arpack(matrix, k, start, tolerance, iterations)
    while True:
        start = generator.standard_normal(d)
        rest = _deflated(matrix, values, vectors)
        value, vector = _arpack(rest, 1, start, tolerance, iterations)
        if value[0] <= values[-1] + tolerance * abs(values).max():
            return values, vectors
        basis = np.linalg.qr(np.hstack([vectors, vector]))[0]
        found, turn = np.linalg.eigh(basis.T @ (matrix @ basis))  # Rayleigh and Ritz
        values, vectors = found[:0:-1], basis @ turn[:, :0:-1]


def _deflated(matrix: LinearOperator, values: np.ndarray, vectors: np.ndarray) -> LinearOperator:
    """The matrix with the eigenvalues given moved well below the least of them."""
    below = values[-1] - (abs(values).max() or 1)
    shifts = np.diag(values - below)
    found = aslinearoperator(vectors) @ aslinearoperator(shifts) @ aslinearoperator(vectors.T)
    return matrix - found


def _arpack(
    matrix: LinearOperator, k: int, start: np.ndarray, tolerance: float, iterations: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greatest eigenvalues [k], descending, and vectors [d, k], one of each eigenspace for sure."""
    seed = {"rng": np.random.default_rng(0)} if SEEDED else {}
    try:
        values, vectors = eigsh(
            matrix, k=k, which="LA", v0=start, tol=tolerance, maxiter=iterations, **seed
        )
    except ArpackNoConvergence as error:
        raise NotConvergedError(
            f"{len(error.eigenvalues)} of {k} eigenpairs reached a residual of {tolerance:.1g}·|λ| "
            f"in {iterations} restarts; eigenvalues that lie close together converge slowly: "
            f"allow more iterations, a larger tolerance, or ask for another k"
        ) from error
    order = values.argsort()[::-1]
    return values[order], vectors[:, order]
