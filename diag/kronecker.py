"""Kronecker singular values: the spectrum of a block rearranged by Van Loan and Pitsianis."""

import torch
from torch import Tensor

from diag.blocks import Block
from diag.operators import KroneckerSum, Operator, dense
from diag.sample_mean import SampleMean


def kronecker_singular_values(operator: Operator, block: Block | None = None) -> Tensor:
    """All singular values [r] of the rearranged block, largest first.

    ‖C‖_F² = Σ σ_k², and the best sum of r Kronecker products misses (Σ_{k>r} σ_k²)^½.

    Raises: ValueError for a dense operator without a `block` that has one matrix [W, b].
    """
    if isinstance(operator, SampleMean):
        return operator.kronecker_svd.values
    return torch.linalg.svdvals(_rearranged(operator, block))


def leading_kronecker(operator: Operator, rank: int, block: Block | None = None) -> KroneckerSum:
    """Σ_{k<=rank} σ_k left_k ⊗ right_k, the leading terms of C = Σ σ_k left_k ⊗ right_k.

    Raises: ValueError for a dense operator without a `block` that has one matrix [W, b].
    """
    if isinstance(operator, SampleMean):
        values, left, right = operator.kronecker_svd
        lefts, rights = left(rank), right(rank)
    else:
        tiles = _rearranged(operator, block)
        o, i = (round(size**0.5) for size in tiles.shape)
        left, values, right = torch.linalg.svd(tiles, full_matrices=False)
        lefts = left.T[:rank].reshape(-1, o, o)
        rights = right[:rank].reshape(-1, i, i)
    return KroneckerSum(values[:rank, None, None] * lefts, rights)


def _rearranged(operator: Operator, block: Block | None) -> Tensor:
    """[o², i²]: row (o, p) holds the tile of output neurons o and p."""
    if block is None:
        raise ValueError(
            f"the factor sizes of a {type(operator).__name__} truth are unknown; Kronecker "
            f"singular values need its block, and the metrics built on them a Linear layer with "
            f"one row per example"
        )
    member = block.single
    if member is None or not member.w_bar:
        raise ValueError(f"block {block} is not one matrix [W, b], so it has no Kronecker factors")
    o, i = member.matrix_shape
    return dense(operator).reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
