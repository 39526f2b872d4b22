"""Mini-blocks of a Linear layer: one small block per neuron."""

import torch
from torch import Tensor

from diag.blocks import Block
from diag.operators import BlockDiagonal, Kronecker
from diag.problem import Problem
from diag.registry import approximation
from diag.samples import SampleMean, sample_truth

MBF = "Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124), section 3"


@approximation(
    "mini_block", of="ggn", kind="curvature", reference=MBF, exact_on=("last_layer_mse",)
)
def mini_block(problem: Problem, block: Block, of: str = "ggn") -> BlockDiagonal:
    """One block per OUTPUT neuron o: mean_n C_n[o, o] a_n a_nᵀ, [in+1, in+1].

    These are the exact sub-blocks, rows of W_bar, contiguous in row-major order.

    Raises: ValueError for a block that is not a Linear layer with one row per example.
    """
    truth = sample_truth(problem, block, of, "mini_block")
    return BlockDiagonal(_output_blocks(truth))


@approximation(
    "mini_block_shared", of="ggn", kind="curvature", reference=MBF, exact_on=("last_layer_mse",)
)
def mini_block_shared(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """The mean of the output neurons' blocks, shared by all: I_out ⊗ M.

    M [in+1, in+1] = mean_n (tr C_n / out) a_n a_nᵀ: what Mini-Block Fisher keeps per FC layer.

    Raises: ValueError for a block that is not a Linear layer with one row per example.
    """
    truth = sample_truth(problem, block, of, "mini_block_shared")
    weights = truth.C.diagonal(dim1=1, dim2=2).mean(1)
    shared = (truth.a * weights[:, None]).T @ truth.a / truth.n
    return Kronecker(torch.eye(truth.factor_sizes[0]).to(shared), shared)


@approximation(
    "mini_block_input", of="ggn", kind="curvature", reference=MBF, exact_on=("scalar_input_mse",)
)
def mini_block_input(problem: Problem, block: Block, of: str = "ggn") -> BlockDiagonal:
    """One block per INPUT neuron i: mean_n a_n[i]² C_n, [out, out]; columns of W_bar.

    Raises: ValueError for a block that is not a Linear layer with one row per example.
    """
    truth = sample_truth(problem, block, of, "mini_block_input")
    o, i = truth.factor_sizes
    blocks = torch.einsum("ni,nop->iop", truth.a.square(), truth.C) / truth.n
    order = torch.arange(o * i, device=blocks.device).reshape(o, i).T.reshape(-1)
    return BlockDiagonal(blocks, order)


def _output_blocks(truth: SampleMean) -> Tensor:
    """Blocks [out, in+1, in+1], one weighted Gram product per neuron."""
    weights = truth.C.diagonal(dim1=1, dim2=2).T  # [out, n]
    return (weights[:, None, :] * truth.a.T) @ truth.a / truth.n
