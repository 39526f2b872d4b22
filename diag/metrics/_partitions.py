"""Partitions of a block's coordinates, and the share of a truth outside their parts.

A partition is a tensor of part numbers [d], one for every coordinate.
"""

from functools import singledispatch
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from ..operators import BlockDiagonal, Damped, Diagonal, Inverse, Kronecker, Operator, dense
from ..operators.batched import BatchedSymmetric, Diagonals, Outer, Packed, squared_blocks
from ..operators.dtypes import Converted
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.low_rank_terms import LowRankTerms

AT_ONCE = 2**24  # entries of a dense matrix compared at a time


@singledispatch
def partition_of(operator: Any) -> Tensor:
    """Part numbers [d] of an operator that is zero between its parts.

    The blocks of a BlockDiagonal, every coordinate by itself for a Diagonal, and for a Kronecker
    product what the zeros of its factors leave unconnected: the neurons of I ⊗ A. Any other
    operator is one part.
    """
    return torch.zeros(operator.shape[0], dtype=torch.long)


@partition_of.register
def _(operator: Diagonal) -> Tensor:
    return torch.arange(len(operator.diagonal))


@partition_of.register
def _(operator: BlockDiagonal) -> Tensor:
    sizes = torch.tensor([len(block) for block in operator.blocks])
    parts = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    return parts if operator.order is None else parts[operator.order.argsort().cpu()]


@partition_of.register
def _(operator: Kronecker) -> Tensor:
    left, right = (_connected(factor) for factor in (operator.left, operator.right))
    return (left[:, None] * (right.max() + 1) + right).reshape(-1)


@partition_of.register
def _(operator: Damped | Inverse | Converted) -> Tensor:
    return partition_of(operator.base)


def _connected(factor: Tensor) -> Tensor:
    labels = connected_components(csr_array((factor != 0).cpu().numpy()), directed=False)[1]
    return torch.from_numpy(labels.astype(np.int64))


def check_partition(partition: Tensor, d: int) -> Tensor:
    """The partition with parts counted from 0.

    Raises: ValueError for a tensor that is not one whole number for each of the d coordinates.
    """
    if partition.shape != (d,) or partition.is_floating_point():
        raise ValueError(
            f"a partition is a tensor of part numbers, one for each of the {d} coordinates; this "
            f"one has shape {tuple(partition.shape)} and dtype {partition.dtype}"
        )
    return partition.unique(return_inverse=True)[1].cpu()


def outside_gram(truth: Operator, partition: Tensor) -> tuple[Tensor, Tensor] | None:
    """Gram matrix <T_n, T_m> of the terms' entries outside the parts, and of all, each [N, N].

    partition: as `check_partition` gives it. None for a truth without per-example terms, and for
    Kronecker terms whose parts are no grid of output and input groups.
    """
    if isinstance(truth, LowRankTerms):
        return truth.gram - _inside_roots(truth, partition), truth.gram
    if not isinstance(truth, KroneckerTerms):
        return None
    o, i = truth.factor_sizes
    table = partition.reshape(o, i)
    rows = table.unique(dim=0, return_inverse=True)[1]
    columns = table.unique(dim=1, return_inverse=True)[1]
    if len(table.unique()) != (rows.max() + 1) * (columns.max() + 1):
        return None
    inside = _inside_stack(truth.left, rows) * _inside_stack(Outer(truth.a[:, None]), columns)
    return truth.gram - inside, truth.gram


def _inside_roots(truth: LowRankTerms, partition: Tensor) -> Tensor:
    """Σ_parts ‖V_nᵀV_m‖² over the part's rows alone, [N, N]."""
    if partition.max() == len(partition) - 1:
        diagonals = truth.V.square().sum(1).double()
        return diagonals @ diagonals.T
    V = truth.V[:, :, partition.argsort().to(truth.V.device)]
    parts = V.split(partition.bincount().tolist(), dim=2)
    return torch.stack([squared_blocks(part, part) for part in parts]).sum(0)


def _inside_stack(stack: BatchedSymmetric, groups: Tensor) -> Tensor:
    """Σ_groups <C_n, C_m> over the group's rows and columns alone, [N, N]."""
    count = int(groups.max()) + 1
    if count == 1:
        return stack.gram()
    if count == stack.size:
        diagonals = stack.diagonals().double()
        return diagonals @ diagonals.T
    members = [(groups == group).nonzero()[:, 0] for group in range(count)]
    return torch.stack([_part(stack, own).gram() for own in members]).sum(0)


def _part(stack: BatchedSymmetric, own: Tensor) -> BatchedSymmetric:
    """The stack of the principal sub-matrices on the coordinates `own`."""
    if isinstance(stack, Outer):
        return Outer(stack.roots[:, :, own.to(stack.roots.device)])
    if isinstance(stack, Diagonals):
        return Diagonals(stack.values[:, own.to(stack.values.device)])
    matrices = stack.matrices()
    at = own.to(matrices.device)
    return Packed.of(matrices[:, at][:, :, at])


def outside_square(truth: Operator, partition: Tensor) -> tuple[float, float]:
    """(Σ of the squared entries outside the parts, ‖C‖_F²), entry by entry.

    Raises: ValueError where the dense matrix is over the memory budget.
    """
    matrix = dense(truth)
    parts = partition.to(matrix.device)
    some = max(1, AT_ONCE // len(matrix))
    pairs = zip(matrix.split(some), parts.split(some), strict=True)
    outside = sum(rows[own[:, None] != parts].square().sum().item() for rows, own in pairs)
    return outside, matrix.square().sum().item()
