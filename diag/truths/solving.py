"""Linear solves with truths of any size: dense, by Woodbury, or by conjugate gradients.

Woodbury is for truths of few columns, C = FᵀF with F [m, d] and m < d:
(C + λI)⁻¹ = (I − Fᵀ (FFᵀ + λI)⁻¹ F) / λ.
"""

import torch
from scipy.sparse.linalg import cg
from torch import Tensor

from ..operators import Damped, Operator, like, to_scipy
from ..operators.batched import Outer
from ..operators.solving import dense_solver, solver_rule
from ..operators.structures import Map, by_columns
from .kronecker_terms import KroneckerTerms
from .low_rank_terms import LowRankTerms
from .matrix_free import MatrixFree

DENSE_UP_TO = 6000  # parameters; a factorisation of this size takes seconds
COLUMNS_UP_TO = 12_000  # m; FFᵀ and its factor then stay near 2 GiB
RESIDUAL = {torch.float64: 1e-10, torch.float32: 1e-5}
MOST_PRODUCTS = 5000


class NotSolvedError(ArithmeticError):
    """Conjugate gradients did not reach the residual asked for."""


@solver_rule(LowRankTerms)
def _(operator: LowRankTerms, damping: float) -> Map:
    m, d = operator.V.shape[0] * operator.V.shape[1], operator.shape[0]
    if damping > 0 and m < d and m <= COLUMNS_UP_TO:
        F = operator.columns
        return _woodbury(lambda v: F @ v, lambda u: F.T @ u, operator.column_gram, damping)
    return dense_solver(operator, damping) if d <= DENSE_UP_TO else _by_products(operator, damping)


@solver_rule(KroneckerTerms)
def _(operator: KroneckerTerms, damping: float) -> Map:
    d = operator.shape[0]
    if d <= DENSE_UP_TO:
        return dense_solver(operator, damping)
    if damping > 0 and isinstance(operator.left, Outer):
        n, k, _ = operator.left.roots.shape
        if n * k <= COLUMNS_UP_TO:
            return _in_sample_space(operator, operator.left.roots, damping)
    return _by_products(operator, damping)


def _in_sample_space(operator: KroneckerTerms, R: Tensor, damping: float) -> Map:
    """Woodbury with the columns r_nk ⊗ a_n, without forming them."""
    (n, k, o), a = R.shape, operator.a
    scale = n**-0.5

    def project(v: Tensor) -> Tensor:  # [d, c] -> [n·k, c]
        W = v.T.reshape(-1, o, a.shape[1])
        return scale * torch.einsum("nko,noc->nkc", R, (W @ a.T).permute(2, 1, 0)).flatten(0, 1)

    def expand(u: Tensor) -> Tensor:  # [n·k, c] -> [d, c]
        bent = torch.einsum("nko,nkc->con", R, u.reshape(n, k, -1))
        return scale * (bent @ a).flatten(1).T

    return _woodbury(project, expand, operator.column_gram, damping)


def _woodbury(project: Map, expand: Map, gram: Tensor, damping: float) -> Map:
    """The function applying (FᵀF + λI)⁻¹ given F, Fᵀ and FFᵀ."""
    shifted = gram.clone()
    shifted.diagonal().add_(damping)
    factor = torch.linalg.cholesky(shifted)

    def solve(v: Tensor) -> Tensor:
        columns = v[:, None] if v.ndim == 1 else v
        small = torch.cholesky_solve(project(columns).double(), factor).to(columns)
        found = (columns - expand(small)) / damping
        return found[:, 0] if v.ndim == 1 else found

    return solve


def _by_products(operator: Operator, damping: float) -> Map:
    """Conjugate gradients, column by column. Raises: NotSolvedError."""
    matrix, entries = to_scipy(Damped(operator, damping)), like(operator)
    residual = RESIDUAL[entries.dtype]

    def one(v: Tensor) -> Tensor:
        found, products = cg(
            matrix, v.to(entries).cpu().numpy(), rtol=residual, maxiter=MOST_PRODUCTS
        )
        if products:
            raise NotSolvedError(
                f"conjugate gradients with C + {damping:g} I, d = {operator.shape[0]:,}, did not "
                f"reach a relative residual of {residual:g} in {products} products; a larger "
                f"damping, fewer examples or dtype=torch.float64 help"
            )
        return torch.from_numpy(found).to(v)

    return lambda v: by_columns(lambda rows: torch.stack([one(row) for row in rows]), v)


solver_rule(MatrixFree)(_by_products)
