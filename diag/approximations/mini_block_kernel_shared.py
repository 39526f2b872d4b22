"""Mini-blocks of a convolution by input channel, shared by its output channels."""

import torch

from ..operators import Kronecker
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ._mini_blocks import MBF, kernel_shape, matrix_truth, mean_sub_blocks, places


@approximation("mini_block_kernel_shared", of="ggn", kind="curvature", reference=MBF)
def mini_block_kernel_shared(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """The kernel slices' blocks averaged over the output channels: I_out ⊗ blockdiag(M_1, ..., β).

    M_i [kh·kw, kh·kw] is the mean over o of the blocks of w_{o,i}, β the mean of the biases' 1 x 1
    blocks: out times less to keep and to invert than `mini_block_kernel`. In groups, slices at the
    same place of their group share.

    Raises: ValueError for a block that is not a convolution's [W, b].
    """
    out, channels, kernel = kernel_shape(problem, block, "mini_block_kernel_shared")
    truth = matrix_truth(problem, block, of, "mini_block_kernel_shared")
    where = places(block.members[0])
    shared = [*mean_sub_blocks(truth, where[:, : channels * kernel].reshape(out, channels, kernel))]
    if where.shape[1] > channels * kernel:
        shared += [*mean_sub_blocks(truth, where[:, None, -1:])]
    right = torch.block_diag(*shared)
    return Kronecker(torch.eye(out).to(right), right)
