"""Dominant eigenpair and leading eigenspace of an operator."""

from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..operators import BlockDiagonal, Diagonal, Kronecker, Operator, dense, like, to_scipy
from ..operators.structures import Map
from ..truths.low_rank_terms import LowRankTerms
from .extreme_eigenpairs import DENSE_UP_TO, arpack, top_eigenpairs

RESIDUAL = 1e-6  # of a Lanczos pair, relative to |λ|; its eigenvalue errs by about the square
TIE_EPSILONS = 1000  # times eps and the greatest eigenvalue: eigenvalues this close tie


class Eigenpair(NamedTuple):
    """An eigenvalue and its unit vector [d]."""

    value: float
    vector: Tensor


def dominant(operator: Operator, scale: float = 0.0) -> Eigenpair:
    """Eigenpair of the greatest |λ|, the spectral norm with its sign.

    By full decomposition up to d = 400, else by Lanczos (ARPACK) from a fixed start vector. scale:
    norm of the operands of a difference; a product that is only their rounding gives the value 0.

    Raises: NotConvergedError.

    >>> dominant(Diagonal(torch.tensor([1.0, -7.0, 3.0]))).value
    -7.0
    """
    d, entries = operator.shape[0], like(operator)
    if d <= DENSE_UP_TO:
        values, vectors = torch.linalg.eigh(dense(operator))
        at = values.abs().argmax()
        return Eigenpair(values[at].item(), vectors[:, at])
    start = np.random.default_rng(d).standard_normal(d).astype(to_scipy(operator).dtype)
    size = float(np.linalg.norm(to_scipy(operator) @ start) / np.linalg.norm(start))
    noise = 100 * torch.finfo(entries.dtype).eps * scale
    if size <= noise:
        return Eigenpair(0.0, torch.from_numpy(start / np.linalg.norm(start)).to(entries))
    tolerance = max(RESIDUAL, noise / size)
    values, found = arpack(to_scipy(operator), 1, start, tolerance, which="LM")
    return Eigenpair(values[0].item(), torch.from_numpy(found[:, 0].copy()).to(entries))


def leading(values: Tensor, k: int) -> Tensor:
    """Mask [d] of the k greatest positive eigenvalues and all that tie with the k-th."""
    greatest = values.topk(min(k, len(values))).values
    rounding = TIE_EPSILONS * torch.finfo(values.dtype).eps * greatest[0].abs()
    return (values > rounding) & (values >= greatest[-1] - rounding)


def leading_vectors(operator: Operator, k: int) -> Tensor:
    """Orthonormal basis [d, m] of the eigenspace of the k greatest positive eigenvalues.

    m < k where fewer are positive, m > k where several tie with the k-th (not above d = 400, where
    Lanczos finds k).

    Raises: NotConvergedError.
    """
    d = operator.shape[0]
    if isinstance(operator, LowRankTerms) and operator.n * operator.V.shape[1] < d:
        values, small = torch.linalg.eigh(operator.column_gram)
        chosen = leading(values, k)
        roots = (small[:, chosen] / values[chosen].sqrt()).to(operator.V)
        return operator.columns.T @ roots
    if d <= DENSE_UP_TO:
        values, vectors = torch.linalg.eigh(dense(operator))
    else:
        values, vectors, _ = top_eigenpairs(operator, min(k, d))
    return vectors[:, leading(values, k)]


class Eigenspace(NamedTuple):
    """Space of dimension `size`; coordinates maps vectors [d, c] to theirs in it, [size, c]."""

    size: int
    coordinates: Map


@singledispatch
def leading_space(operator: Any, k: int) -> Eigenspace:
    """The span of `leading_vectors`; by structure, where all ties join at any size."""
    vectors = leading_vectors(operator, k)
    return Eigenspace(vectors.shape[1], lambda v: vectors.T @ v)


def _space(values: Tensor, turn: Map, k: int) -> Eigenspace:
    chosen = leading(values, k)
    return Eigenspace(int(chosen.sum()), lambda v: turn(v)[chosen])


@leading_space.register
def _(operator: Diagonal, k: int) -> Eigenspace:
    return _space(operator.diagonal, lambda v: v, k)


@leading_space.register
def _(operator: Kronecker, k: int) -> Eigenspace:
    (left, U), (right, W) = (torch.linalg.eigh(side) for side in (operator.left, operator.right))
    back = Kronecker(U.T.contiguous(), W.T.contiguous())
    return _space(torch.outer(left, right).reshape(-1), lambda v: back @ v, k)


@leading_space.register
def _(operator: BlockDiagonal, k: int) -> Eigenspace:
    pairs = [torch.linalg.eigh(block) for block in operator.blocks]
    back = BlockDiagonal([vectors.T.contiguous() for _, vectors in pairs])
    values = torch.cat([own for own, _ in pairs])
    order = slice(None) if operator.order is None else operator.order
    return _space(values, lambda v: back @ v[order], k)
