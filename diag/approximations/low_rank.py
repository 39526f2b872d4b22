"""The nearest matrix of rank r, from the leading eigenpairs."""

import numpy as np
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from ..exact import truth
from ..operators import LowRank, Operator, dense, like, to_scipy
from ..operators.eigen import Spectral
from ..problem import Block, Problem
from ..registry import approximation
from ..truths.low_rank_terms import LowRankTerms

DENSE_UP_TO = 1500  # rows up to which all eigenvectors are found: seconds, and the surest way


@approximation(
    reference="Eckart and Young 1936",
    exact_on=("one_example", "deep_linear_mse", "scalar_input_mse"),
)
def low_rank(problem: Problem, block: Block, rank: int = 10, of: str = "ggn") -> Operator:
    """The matrix of rank at most `rank` nearest to the exact block in Frobenius norm.

    Σ_{k<=rank} λ_k v_k v_kᵀ over the eigenvalues largest in absolute value; its error is
    (Σ_{k>rank} λ_k²)^½. A LowRank where none of them is negative, else a Spectral, with signs.
    From all eigenvectors of the block or of its roots' Gram matrix up to 1,500 rows, else by
    Lanczos, to machine precision. Works for every block.

    Raises: ValueError for rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    operator = truth(problem, block, of)
    if isinstance(operator, LowRankTerms) and len(operator.columns) <= min(DENSE_UP_TO, block.d):
        return LowRank(_by_gram(operator, rank))
    if block.d <= DENSE_UP_TO or rank >= block.d - 1:  # so many Lanczos cannot find
        values, vectors = torch.linalg.eigh(dense(operator))
    else:
        values, vectors = _by_lanczos(operator, rank)
    return _assembled(values, vectors, rank)


def _assembled(values: Tensor, vectors: Tensor, rank: int) -> Operator:
    """The operator of the `rank` eigenpairs largest in absolute value."""
    kept = values.abs().argsort(descending=True)[:rank]
    values, vectors = values[kept], vectors[:, kept]
    # rounding leaves a semi-definite truth's zeros below zero by about this much
    noise = len(vectors) * torch.finfo(values.dtype).eps * values.abs().max()
    if (values >= -noise).all():
        return LowRank(vectors * values.clamp(min=0).sqrt())
    return Spectral(vectors, values)


def _by_gram(operator: LowRankTerms, rank: int) -> Tensor:
    """The factor [d, rank] from C = FᵀF and F Fᵀ u = λu: √λ v = Fᵀu."""
    vectors = torch.linalg.eigh(operator.column_gram).eigenvectors
    return operator.columns.T @ vectors[:, -rank:].to(operator.columns)


def _by_lanczos(operator: Operator, rank: int) -> tuple[Tensor, Tensor]:
    """The `rank` eigenpairs largest in absolute value, by ARPACK from a fixed start vector."""
    linear, entries = to_scipy(operator), like(operator)
    start = np.random.default_rng(0).standard_normal(linear.shape[0])
    values, vectors = eigsh(linear, k=rank, which="LM", v0=start.astype(linear.dtype))
    found = torch.from_numpy(values), torch.from_numpy(np.ascontiguousarray(vectors))
    return found[0].to(entries), found[1].to(entries)
