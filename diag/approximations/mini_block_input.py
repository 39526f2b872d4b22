"""Mini-blocks by input neuron."""

from ..operators import BlockDiagonal
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ..truths.kronecker_terms import KroneckerTerms
from ._mini_blocks import MBF, matrix_truth, mean_sub_blocks, places


@approximation(
    "mini_block_input", of="ggn", kind="curvature", reference=MBF, exact_on=("scalar_input_mse",)
)
def mini_block_input(problem: Problem, block: Block, of: str = "ggn") -> BlockDiagonal:
    """One block [out, out] per INPUT neuron i: the exact sub-block of a column of W_bar.

    With one row a_n per example it is mean_n a_n[i]² C_n. Gives in+1 blocks; a column of a
    convolution is one entry of its patches.

    Raises: ValueError for a block that is not one matrix [W, b] of a Linear layer or convolution.
    """
    truth = matrix_truth(problem, block, of, "mini_block_input")
    columns = places(block.members[0]).T
    if isinstance(truth, KroneckerTerms):
        blocks = truth.left.weighted(truth.a.T.square() / truth.n)
    else:
        blocks = mean_sub_blocks(truth, columns[None])
    return BlockDiagonal(blocks, columns.reshape(-1).to(blocks.device))
