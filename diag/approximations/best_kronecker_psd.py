"""The best Kronecker product of positive semi-definite factors."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..exact import truth
from ..operators import Kronecker, Operator, dense
from ..problem import Block, Problem
from ..registry import approximation
from ..spectra.kronecker_svd import leading_kronecker
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.low_rank_terms import LowRankTerms

STARTS = 3  # leading Kronecker terms whose positive and negative parts are tried as starts
ROUNDS = 2000
SETTLED = 1e-13  # relative growth of what a round captures, below which it has converged


@approximation(
    reference="alternating projections onto the cone; the unconstrained problem: "
    "Van Loan and Pitsianis 1993",
    exact_on=("deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def best_kronecker_psd(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """The Kronecker product nearest to the exact block whose factors have no negative eigenvalue.

    argmin ‖C − G ⊗ A‖_F over G [out, out] ⪰ 0, A [in+1, in+1] ⪰ 0

    For a positive semi-definite C this is `best_kronecker` (Van Loan and Pitsianis 1993). For an
    indefinite Hessian the factors are improved in turn: given A, the best G is the projection of
    Σ <C, · ⊗ A> / ‖A‖² onto the cone, and the error never rises. Starts: the leading Kronecker
    terms' positive parts, the identity and KFAC's A; the best end is kept. It is a local optimum,
    and zero where every start ends there.

    Raises: ValueError for a block that is not one layer with [W, b].
    """
    operator = truth(problem, block, of)
    terms = leading_kronecker(operator, STARTS, block).terms
    left, right = _upright(terms[0])
    if _semidefinite(left) and _semidefinite(right):  # only rounding is projected away
        return Kronecker(projected(left), projected(right))
    given = contractions(operator, len(left), len(right))
    starts = [projected(sign * term.right) for term in terms for sign in (1, -1)]
    starts.append(torch.eye(len(right)).to(right))
    if isinstance(operator, KroneckerTerms):
        starts.append(operator.right_mean)
    ends = [alternate(given, start) for start in starts]
    return max(ends, key=lambda pair: pair.left.norm() * pair.right.norm())


class Contractions(NamedTuple):
    """left(A) = Σ_ij A_ij C[·i, ·j] [o, o] and right(G) = Σ_op G_op C[o·, p·] [i, i]."""

    left: Callable[[Tensor], Tensor]
    right: Callable[[Tensor], Tensor]


def contractions(operator: Operator, o: int, i: int) -> Contractions:
    """Both partial inner products of a truth, from its per-example terms if it has them."""
    if isinstance(operator, KroneckerTerms):
        a, left = operator.a, operator.left
        return Contractions(
            lambda A: left.weighted(((a @ A) * a).sum(1)[None] / len(a))[0],
            lambda G: (a * left.inners(G)[:, None]).T @ a / len(a),
        )
    if isinstance(operator, LowRankTerms):
        V = operator.V.reshape(-1, o, i)
        return Contractions(
            lambda A: torch.tensordot(V @ A, V, ([0, 2], [0, 2])) / operator.n,
            lambda G: torch.tensordot(G @ V, V, ([0, 1], [0, 1])) / operator.n,
        )
    tiles = dense(operator).reshape(o, i, o, i)
    return Contractions(
        lambda A: torch.einsum("oipj,ij->op", tiles, A),
        lambda G: torch.einsum("oipj,op->ij", tiles, G),
    )


def alternate(given: Contractions, right: Tensor, rounds: int = ROUNDS) -> Kronecker:
    """Best pair of factors by alternating projections, from a right factor.

    With one factor of norm 1 the best other one is the projected contraction, and ‖C − G ⊗ A‖² is
    ‖C‖² − ‖G‖² ‖A‖²: what is captured, ‖G‖ ‖A‖, never falls.
    """
    left, before = right, 0.0
    for _ in range(rounds):
        left = projected(given.left(_unit(right)))
        right = projected(given.right(_unit(left)))
        captured = right.norm().item()
        if captured - before <= SETTLED * captured:
            break
        before = captured
    return Kronecker(_unit(left), right)


def projected(symmetric: Tensor) -> Tensor:
    """Nearest positive semi-definite matrix: negative eigenvalues become zero."""
    values, basis = torch.linalg.eigh(symmetric)
    return (basis * values.clamp(min=0)) @ basis.T


def _unit(matrix: Tensor) -> Tensor:
    norm = matrix.norm()
    return matrix / norm if norm > 0 else matrix


def _upright(term: Kronecker) -> tuple[Tensor, Tensor]:
    """The factors with the sign that makes the left one's trace positive."""
    sign = -1 if term.left.trace() < 0 else 1
    return sign * term.left, sign * term.right


def _semidefinite(factor: Tensor) -> bool:
    """Whether no eigenvalue is negative beyond rounding; errors depend on it in second order."""
    least = torch.linalg.eigvalsh(factor)[0]
    return bool(least >= -(torch.finfo(factor.dtype).eps ** 0.4) * factor.norm())
