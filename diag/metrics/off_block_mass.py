"""Share of the truth's norm outside the approximation's blocks."""

import math

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.intervals import from_replicates, norm_deviations
from ._partitions import check_partition, outside_gram, outside_square, partition_of


@metric(
    formula="(1 − Σ_b ‖C_bb‖_F² / ‖C‖_F²)^½ over the blocks b of B",
    range="[0, 1]",
    best="0",
    reference="Golub and Van Loan 2013, section 2.3",
)
def off_block_mass(
    truth: Operator, approximation: Operator | None = None, partition: Tensor | None = None
) -> Estimate:
    """Relative Frobenius error of the best matrix with the approximation's blocks.

    That matrix keeps the truth's own blocks. Range [0, 1], 0 is best. Blocks: those of a
    BlockDiagonal, every coordinate of a Diagonal, the neurons of I ⊗ A; any other operator is one
    block, with nothing outside.
    partition: part number of every coordinate [d], instead of the approximation's blocks.
    Interval: bootstrap over the truth's examples where the blocks are groups of outputs times
    groups of inputs, or the truth is a mean of V Vᵀ; else entry by entry, value only.

    Raises: ValueError for neither or both of approximation and partition, for a partition that
    does not fit, and over the memory budget.
    """
    if (approximation is None) == (partition is None):
        raise ValueError("off_block_mass needs an approximation with blocks or a partition=, one")
    parts = partition_of(approximation) if partition is None else partition
    parts = check_partition(parts, truth.shape[0])
    grams = outside_gram(truth, parts)
    if grams is None:
        mass, square = outside_square(truth, parts)
        numbers = torch.tensor([mass / square if square else math.nan])
    else:
        outside, whole = (_with_replicates(gram) for gram in grams)
        numbers = outside / whole
    return from_replicates(numbers.clamp(0, 1).sqrt(), truth, undefined=1.0)


def _with_replicates(gram: Tensor) -> Tensor:
    """Mean of the Gram matrix and its bootstrap replicates, [1 + REPLICATES]; [1] for N = 1."""
    own = gram.mean()[None]
    if len(gram) == 1:
        return own
    return torch.cat([own, (own + norm_deviations(gram)).clamp(min=0)])
