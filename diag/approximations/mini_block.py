"""Mini-blocks by output neuron."""

from ..operators import BlockDiagonal
from ..operators.batched import Diagonals
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ..truths.kronecker_terms import KroneckerTerms, output_blocks
from ._mini_blocks import MBF, matrix_truth, mean_sub_blocks, places

HELD_UP_TO = 2**22  # entries of all blocks together


@approximation(
    "mini_block",
    of="ggn",
    kind="curvature",
    reference=MBF,
    exact_on=("last_layer_mse", "scalar_input_mse"),
)
def mini_block(problem: Problem, block: Block, of: str = "ggn") -> BlockDiagonal | KroneckerTerms:
    """One block [in+1, in+1] per OUTPUT neuron or channel: the exact sub-block of a row of W_bar.

    With one row a_n per example that of o is mean_n C_n[o, o] a_n a_nᵀ. Gives out blocks, which are
    contiguous in row-major order; `mini_block_kernel` cuts convolutions finer. Where the blocks
    would take more than 32 MiB the same matrix is given as (1/N) Σ_n diag(C_n) ⊗ a_n a_nᵀ.

    Raises: ValueError for a block that is not one matrix [W, b] of a Linear layer or convolution.
    """
    truth = matrix_truth(problem, block, of, "mini_block")
    if isinstance(truth, KroneckerTerms):
        o, i = truth.factor_sizes
        if o * i**2 > HELD_UP_TO:
            return KroneckerTerms(truth.a, Diagonals(truth.left.diagonals()))
        return BlockDiagonal(output_blocks(truth))
    return BlockDiagonal(mean_sub_blocks(truth, places(block.members[0])[None]))
