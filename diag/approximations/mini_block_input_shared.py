"""One mini-block for all input neurons."""

import torch

from ..operators import Kronecker
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ..truths.kronecker_terms import KroneckerTerms
from ._mini_blocks import MBF, matrix_truth, mean_sub_blocks, places


@approximation(
    "mini_block_input_shared",
    of="ggn",
    kind="curvature",
    reference=MBF,
    exact_on=("scalar_input_mse",),
)
def mini_block_input_shared(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """The mean of the input neurons' blocks, shared by all: N ⊗ I_{in+1}.

    N [out, out] = (1/(in+1)) Σ_i (block of i); with one row a_n per example it is
    mean_n (‖a_n‖² / (in+1)) C_n.

    Raises: ValueError for a block that is not one matrix [W, b] of a Linear layer or convolution.
    """
    truth = matrix_truth(problem, block, of, "mini_block_input_shared")
    columns = places(block.members[0]).T
    if isinstance(truth, KroneckerTerms):
        shared = truth.left.weighted(truth.a.square().mean(1)[None] / truth.n)[0]
    else:
        shared = mean_sub_blocks(truth, columns[:, None])[0]
    return Kronecker(shared, torch.eye(len(columns)).to(shared))
