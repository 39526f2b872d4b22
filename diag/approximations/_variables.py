"""Second moments of minibatch gradients along each tensor axis, as Shampoo and TNT average them.

A weight and its bias are two variables; a gradient is the mean over `batch` examples.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from ..backward.positions import Positions
from ..operators import KroneckerSum
from ..problem import Block, Problem
from ._terms import partial_traces, roots

LABELLED = ("empirical_fisher", "fisher_mc")  # truths whose roots are gradients with labels


@dataclass(frozen=True)
class Variable:
    """A weight or a bias: its columns of W_bar and the second moment along each axis.

    axes: H_i [n_i, n_i] = E[ĝ contracted with itself over all axes but i]; all have one trace.
    """

    columns: slice
    axes: tuple[Tensor, ...]


def variables(
    problem: Problem, block: Block, of: str, batch: int, asked_by: str, flat: bool = False
) -> list[Variable]:
    """Variables of the block; a convolution's weight has axes (O, I, kernel), others (out, in).

    flat: a convolution's weight as a matrix [O, I·kernel], as in W_bar.
    """
    gradients = mean_gradients(problem, block, of, batch, asked_by)
    member, width = block.single, gradients.a.shape[2]
    assert member is not None  # it has positions
    shapes = {
        n.rpartition(".")[2]: s for n, s in zip(member.parameters, member.shapes, strict=True)
    }
    found = []
    if "weight" in shapes:
        columns, shape = slice(0, prod(shapes["weight"][1:])), shapes["weight"]
        left, right = partial_traces(Positions(gradients.a[..., columns], gradients.b))
        split = len(shape) > 2 and not flat
        rights = _split(right, shape[1]) if split else (right,)
        found.append(Variable(columns, (left, *rights)))
    if "bias" in shapes:
        columns = slice(width - 1, width)
        left, _ = partial_traces(Positions(gradients.a[..., columns], gradients.b))
        found.append(Variable(columns, (left,)))
    return found


def _split(right: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Contractions over the kernel and over the channels of [I·kernel, I·kernel]."""
    tiles = right.reshape(channels, len(right) // channels, channels, -1)
    return tiles.diagonal(dim1=1, dim2=3).sum(-1), tiles.diagonal(dim1=0, dim2=2).sum(-1)


def mean_gradients(problem: Problem, block: Block, of: str, batch: int, asked_by: str) -> Positions:
    """Positions whose block is E[vec ĝ vec ĝᵀ], ĝ the mean gradient of a minibatch.

    With labels (the data's, or sampled) the minibatches are the problem's examples in order, whose
    examples count as further positions of one long example. For the other truths ĝ is a mean of
    independent zero-mean gradients with each example's curvature as covariance, so that
    E[vec ĝ vec ĝᵀ] is C / batch.

    Raises: ValueError for a batch that does not divide the number of examples.
    """
    if batch < 1 or problem.n % batch:
        sizes = [m for m in range(1, problem.n + 1) if problem.n % m == 0]
        raise ValueError(
            f"{asked_by}: batch={batch} does not divide the {problem.n} examples into minibatches; "
            f"use one of {sizes}"
        )
    found = roots(problem, block, of, asked_by)
    if of not in LABELLED:
        return Positions(found.a, found.b / batch**0.5)
    k, o = found.b.shape[1], found.b.shape[3]
    b = found.b.reshape(-1, batch, k, found.b.shape[2], o).movedim(2, 1)
    a = found.a.reshape(len(b), -1, found.a.shape[2])
    return Positions(a, b.reshape(len(b), k, -1, o) / batch)


def per_variable(
    found: list[Variable], factors: Callable[[tuple[Tensor, ...]], list[Tensor]], width: int
) -> KroneckerSum:
    """Block-diagonal matrix, weight | bias, of the Kronecker product of each variable's factors."""
    lefts, rights = [], []
    for variable in found:
        left, *others = factors(variable.axes)
        right = left.new_zeros(width, width)
        own = left.new_ones(1, 1)
        for other in others:
            own = torch.kron(own, other)
        right[variable.columns, variable.columns] = own
        lefts.append(left)
        rights.append(right)
    return KroneckerSum(torch.stack(lefts), torch.stack(rights))


def power(H: Tensor, exponent: float) -> Tensor:
    """H^exponent of a positive semi-definite H [k, k]; eigenvalues that are rounding become zero.

    A sixth root would turn 1e-17 in place of a zero into 1e-3.
    """
    values, basis = torch.linalg.eigh(H)
    noise = len(H) * torch.finfo(H.dtype).eps * values[-1]
    return (basis * values.where(values > noise, 0).pow(exponent)) @ basis.T
