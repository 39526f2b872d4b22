"""Mini-blocks of a convolution by kernel slice."""

from ..operators import BlockDiagonal
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ._mini_blocks import MBF, kernel_shape, matrix_truth, mean_sub_blocks, places


@approximation("mini_block_kernel", of="ggn", kind="curvature", reference=MBF)
def mini_block_kernel(problem: Problem, block: Block, of: str = "ggn") -> BlockDiagonal:
    """One block [kh·kw, kh·kw] per kernel slice w_{o,i} of a convolution, 1 x 1 for each bias.

    The exact sub-blocks: mean_n Σ_k d dᵀ with d_{nk,o,i} = Σ_t b_{nk,t,o} patch_{n,i,t}, for the
    truths that have roots b. Slices are contiguous in row-major order, each output channel's bias
    follows its slices. Convolutions in any number of dimensions and groups, every truth.
    What Mini-Block Fisher keeps per convolution.

    Raises: ValueError for a block that is not a convolution's [W, b].
    """
    out, channels, kernel = kernel_shape(problem, block, "mini_block_kernel")
    truth = matrix_truth(problem, block, of, "mini_block_kernel")
    where = places(block.members[0])
    slices = where[:, : channels * kernel].reshape(1, out * channels, kernel)
    blocks = mean_sub_blocks(truth, slices)
    if where.shape[1] == channels * kernel:
        return BlockDiagonal(blocks)
    biases = mean_sub_blocks(truth, where[None, :, -1:])
    rows = zip(blocks.unflatten(0, (out, channels)), biases, strict=True)
    return BlockDiagonal([part for row, bias in rows for part in (*row, bias)])
