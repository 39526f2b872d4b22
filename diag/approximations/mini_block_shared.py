"""One mini-block for all output neurons."""

import torch

from ..operators import Kronecker
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ..truths.kronecker_terms import KroneckerTerms
from ._mini_blocks import MBF, matrix_truth, mean_sub_blocks, places


@approximation(
    "mini_block_shared",
    of="ggn",
    kind="curvature",
    reference=MBF,
    exact_on=("last_layer_mse", "scalar_input_mse"),
)
def mini_block_shared(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """The mean of the output neurons' blocks, shared by all: I_out ⊗ M.

    M [in+1, in+1] = (1/out) Σ_o (block of o); with one row a_n per example it is
    mean_n (tr C_n / out) a_n a_nᵀ. What Mini-Block Fisher keeps per fully connected layer.

    Raises: ValueError for a block that is not one matrix [W, b] of a Linear layer or convolution.
    """
    truth = matrix_truth(problem, block, of, "mini_block_shared")
    rows = places(block.members[0])
    if isinstance(truth, KroneckerTerms):
        weights = truth.left.diagonals().mean(1)
        shared = (truth.a * weights[:, None]).T @ truth.a / truth.n
    else:
        shared = mean_sub_blocks(truth, rows[:, None])[0]
    return Kronecker(torch.eye(len(rows)).to(shared), shared)
