"""Determinants, inverses and generalised eigenvalues of a pair C + λI, B + μI.

Of a thin truth, C = F Fᵀ with F [d, r] and r < d, through r x r matrices and solves with B; of any
other densely.
"""

import torch

from ..operators import (
    BUDGET,
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    LowRank,
    Operator,
    dense,
    dense_inverse,
    inner,
    keep,
    solver,
    trace,
)
from ..operators.batched import Outer
from ..operators.compositions import Product, Solved
from ..operators.solving import cholesky
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.low_rank_terms import LowRankTerms
from ..truths.per_example import PerExampleTerms
from .eigenvalues import eigenvalues
from .extreme_eigenpairs import DENSE_UP_TO
from .preconditioned import NotPositiveDefiniteError, square_root

EIGENVALUES_KNOWN = (Diagonal, Kronecker, BlockDiagonal, LowRank, Inverse, LowRankTerms)
STEPS = "step_cosine, step_quality, decrease_efficiency and inverse_secant_consistency"


def within_reach(truth: Operator, metric: str) -> Operator:
    """The truth in the form for this module: LowRankTerms where it is thin.

    Raises: ValueError where the metric would need a dense matrix over the memory budget.
    """
    d = truth.shape[0]
    if isinstance(truth, KroneckerTerms) and isinstance(truth.left, Outer):
        a, R = truth.a, truth.left.roots
        if _few(len(R) * R.shape[1], d):
            return keep(  # V_nk = r_nk ⊗ a_n
                truth, "thin", lambda: LowRankTerms(torch.einsum("nko,ni->nkoi", R, a).flatten(2))
            )
    if 8 * d * d > BUDGET and not is_thin(truth):
        raise ValueError(
            f"{metric} needs the dense matrix of a {type(truth).__name__} of {d} x {d}, "
            f"{8 * d * d / 2**30:.1f} GiB, over the budget of {BUDGET / 2**30:.1f} GiB; {STEPS} "
            f"ask the same of one direction, at any size"
        )
    return truth


def is_thin(truth: Operator) -> bool:
    """Whether C = F Fᵀ with so few columns that its dense matrix need not be formed."""
    return isinstance(truth, LowRankTerms) and _few(truth.n * truth.V.shape[1], truth.shape[0])


def _few(columns: int, d: int) -> bool:
    return columns < d and d > DENSE_UP_TO and 8 * columns * d <= BUDGET


def log_determinant(operator: Operator, damping: float) -> float | None:
    """Log-determinant of operator + damping·I, None where that is not positive definite."""
    if isinstance(operator, EIGENVALUES_KNOWN):
        values = eigenvalues(operator) + damping
        return None if values[0] <= 0 else values.log().sum().item()
    root = cholesky(operator, damping)
    return None if root is None else 2 * root.diagonal().log().sum().item()


def inverses(
    truth: Operator, damping: float, approximation: Operator, added: float
) -> tuple[Operator, Operator]:
    """P = (B + μI)⁻¹ and Q = (C + λI)⁻¹: Dense, or Solved for a thin truth.

    Raises: torch.linalg.LinAlgError for a singular matrix.
    """
    pairs = (Damped(approximation, added), Damped(truth, damping))
    if is_thin(truth):
        P, Q = (Solved(solver(pair, 0.0), pair.shape) for pair in pairs)
        return P, Q
    found = [dense_inverse(pair.base, pair.damping) for pair in pairs]
    matrices = [
        torch.linalg.inv(dense(pair)) if matrix is None else matrix  # symmetric, indefinite
        for pair, matrix in zip(pairs, found, strict=True)
    ]
    return Dense(matrices[0]), Dense(matrices[1])


def inner_with(truth: Operator, other: Operator) -> float:
    """<C, other>, as a mean over examples where the truth has per-example terms."""
    return (
        truth.inners(other).mean().item()
        if isinstance(truth, PerExampleTerms)
        else inner(truth, other)
    )


def inverse_moment(operator: Operator, damping: float, inverted: Operator, power: int) -> float:
    """tr((operator + damping·I)^-power), 1 or 2, given the inverse by `inverses`."""
    if isinstance(inverted, Dense):
        return trace(inverted) if power == 1 else inner(inverted, inverted)
    return ((eigenvalues(operator) + damping) ** -power).sum().item()


def trace_with_inverse(
    truth: Operator, damping: float, inverted: Operator, other: Operator, other_trace: float
) -> float:
    """tr(Q · other) for a symmetric other of known trace; Q = (I - C Q)/λ for a thin truth."""
    if isinstance(inverted, Dense):
        return inner(inverted, other)
    return (other_trace - inner_with(truth, Product([inverted, other]))) / damping


def share_between(
    truth: Operator,
    damping: float,
    approximation: Operator,
    added: float,
    ends: tuple[float, float],
) -> float:
    """Share of the eigenvalues of (B + μI)^-½ (C + λI) (B + μI)^-½ between two positive ends.

    Raises: NotPositiveDefiniteError where B + μI is not positive definite.
    """
    if is_thin(truth):
        if eigenvalues(approximation)[0] + added <= 0:
            raise NotPositiveDefiniteError("the damped approximation")
        least, greatest = (count_below(truth, damping, approximation, added, t) for t in ends)
        return (greatest - least) / truth.shape[0]
    root = square_root(approximation, added)
    matrix = root.inverse(root.inverse(dense(Damped(truth, damping))).T)
    values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    return ((values >= ends[0]) & (values <= ends[1])).double().mean().item()


def count_below(
    truth: Operator, damping: float, approximation: Operator, added: float, end: float
) -> int:
    """Number of eigenvalues t of C + λI = t(B + μI) below `end`, for a thin C.

    As many as F Fᵀ + E has negative ones, E = λI - end·(B + μI) (Sylvester's law of inertia).
    [[-I, Fᵀ], [F, E]] has, by its two Schur complements, the inertia of -I and F Fᵀ + E, and that
    of E and -I - Fᵀ E⁻¹ F, from which they are counted.
    """
    assert isinstance(truth, LowRankTerms)
    F = truth.columns.T
    shifted = solver(approximation, added - damping / end)  # E = -t (B + (μ - λ/t) I)
    small = F.T @ shifted(F) / end - torch.eye(F.shape[1]).to(F)
    below = (torch.linalg.eigvalsh((small + small.T) / 2) < 0).sum()
    own = (eigenvalues(approximation) + added > damping / end).sum()
    return int(below + own) - F.shape[1]
