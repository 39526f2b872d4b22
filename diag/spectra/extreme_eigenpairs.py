"""Greatest and least eigenpairs of an operator by Lanczos, every copy of repeated ones."""

from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import eye_array
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, aslinearoperator, eigsh
from torch import Tensor

from ..operators import Operator, like, to_scipy
from ..randomized.lanczos_quadrature import lanczos
from ..randomized.probes import products
from .eigenvalues import check_budget

DENSE_UP_TO = 400  # below this a full decomposition is faster than Lanczos
NORM_STEPS = 16  # of Lanczos, for a rough ‖C‖
SEEDED = "rng" in signature(eigsh).parameters  # SciPy 1.17 on; before, ARPACK seeds itself


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
    (ARPACK), repeated on what is left for further copies. tolerance: of the residuals, relative to
    ‖C‖; by default the root of the dtype's precision. iterations: restarts allowed.

    Raises: ValueError for k outside [1, d]; NotConvergedError.
    Source: Lehoucq, Sorensen and Yang 1998 (ARPACK users' guide).

    >>> from kronscope.diag.operators import Diagonal
    >>> top_eigenpairs(Diagonal(torch.tensor([1.0, -7.0, 3.0])), k=2).values.tolist()
    [3.0, 1.0]
    """
    return _eigenpairs(operator, k, 1, tolerance, iterations)


def bottom_eigenpairs(
    operator: Operator, k: int, tolerance: float | None = None, iterations: int = 1000
) -> Eigenpairs:
    """The k algebraically least eigenvalues, ascending; otherwise as `top_eigenpairs`."""
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
        check_budget(operator, d)
        identity = torch.eye(d, dtype=torch.float64, device=entries.device)
        values, vectors = torch.linalg.eigh(sign * products(operator, identity))
        values, vectors = values.flip(0)[:k], vectors.flip(1)[:, :k]
    else:
        vectors = _greatest(operator, k, sign, tolerance, iterations)
        values = sign * (vectors * products(operator, vectors)).sum(0)
        values, order = values.sort(descending=True)  # of Rayleigh quotients, moved by rounding
        vectors = vectors[:, order]
    values = sign * values
    residuals = (products(operator, vectors) - values * vectors).norm(dim=0)
    return Eigenpairs(*(part.to(entries) for part in (values, vectors, residuals)))


def _greatest(operator: Operator, k: int, sign: int, tolerance: float, iterations: int) -> Tensor:
    """Eigenvectors [d, k] of the greatest eigenvalues of sign·operator, descending, all copies.

    Found from sign·C + 2‖C‖I with eigenvalues in [1, 3]·‖C‖: ARPACK's tolerance, relative to the
    eigenvalue, can then be met at λ = 0 too. Deflated eigenvalues go to 0.
    """
    d, entries = operator.shape[0], like(operator)
    generator = np.random.default_rng(d)
    start = torch.from_numpy(generator.standard_normal((d, 1))).to(entries.device)
    norm = torch.linalg.eigvalsh(lanczos(operator, start, NORM_STEPS)).abs().max().item()
    if norm == 0:  # the zero matrix, on which ARPACK gives up
        return torch.eye(d, k, dtype=torch.float64, device=entries.device)
    shifted = np.float64(sign / norm) * to_scipy(operator) + 2.0 * aslinearoperator(eye_array(d))

    def greatest(matrix: LinearOperator, k: int) -> tuple[np.ndarray, np.ndarray]:
        start = generator.standard_normal(d)
        return arpack(matrix, k, start, tolerance / 3, maxiter=iterations, rng=generator)

    values, vectors = greatest(shifted, k)
    while True:
        found = aslinearoperator(vectors * values) @ aslinearoperator(vectors.T)
        value, vector = greatest(shifted - found, 1)
        if value[0] <= values[-1] + tolerance:
            return torch.from_numpy(vectors.copy()).to(entries.device)
        basis = np.linalg.qr(np.hstack([vectors, vector]))[0]
        ritz, turn = np.linalg.eigh(basis.T @ (shifted @ basis))
        values, vectors = ritz[:0:-1], basis @ turn[:, :0:-1]


def arpack(
    matrix: LinearOperator, k: int, start: np.ndarray, tolerance: float, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Greatest eigenvalues [k], descending, and vectors [d, k], one of each eigenspace for sure.

    tolerance: of the residuals, relative to the eigenvalue. options: of SciPy's eigsh.
    Raises: NotConvergedError.
    """
    options = {"which": "LA", "rng": np.random.default_rng(0), **options}
    if not SEEDED:
        del options["rng"]
    try:
        values, vectors = eigsh(matrix, k, v0=start, tol=tolerance, **options)
    except ArpackNoConvergence as error:
        raise NotConvergedError(
            f"{len(error.eigenvalues)} of {k} eigenpairs reached a residual of {tolerance:.1g}·|λ| "
            f"in {options.get('maxiter', 10 * len(start))} restarts; eigenvalues that lie close "
            f"together converge slowly: allow more iterations, a larger tolerance, or another k"
        ) from error
    order = values.argsort()[::-1]
    return values[order], vectors[:, order]
