"""What the mini-blocks share: sub-blocks of a layer's exact truth, on places in its [W, b]."""

import torch
from torch import Tensor

from ..exact import truth
from ..operators import Operator, dense
from ..problem.blocks import Block, Member
from ..problem.problem import Problem
from ..truths.low_rank_terms import LowRankTerms

MBF = "Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124), section 3"


def matrix_truth(problem: Problem, block: Block, of: str, asked_by: str) -> Operator:
    """The truth of a block that is one matrix [W, b].

    Raises: ValueError naming another kind of block, and the method.
    """
    if block.single is None or not block.single.w_bar:
        raise ValueError(
            _refusal(problem, block, f"{asked_by} needs a Linear layer or a convolution")
        )
    return truth(problem, block, of)


def kernel_shape(problem: Problem, block: Block, asked_by: str) -> tuple[int, int, int]:
    """(output channels, input channels of each, entries of a kernel) of a convolution's block.

    Raises: ValueError naming another kind of block, and the method.
    """
    member = block.single
    if member is None or not member.w_bar or len(member.shapes[0]) < 3 or member.columns:
        needs = f"{asked_by} needs a convolution and all kernels of its output channels"
        raise ValueError(_refusal(problem, block, needs))
    _, channels, *kernel = member.shapes[0]
    return member.matrix_shape[0], channels, torch.Size(kernel).numel()


def _refusal(problem: Problem, block: Block, needs: str) -> str:
    kinds = [type(problem.model.get_submodule(m.module)).__name__ for m in block.members]
    return (
        f"{needs}; block '{block.name}' is (a part of) {' + '.join(kinds)}; diagonal, "
        f"layer_blocks and the exact truths work for every block"
    )


def places(member: Member) -> Tensor:
    """Where the entries of the member's [W, b] stand in its row-major vector, [out, in+1]."""
    return torch.arange(member.d).reshape(member.matrix_shape)


def mean_sub_blocks(whole: Operator, where: Tensor) -> Tensor:
    """Means over m of the sub-blocks of a truth on the coordinates where[m, k], [k, s, s].

    where [m, k, s]: m = 1 gives k sub-blocks as they are; larger m shares each among m.
    """
    if not isinstance(whole, LowRankTerms):
        matrix = dense(whole)
        where = where.to(matrix.device)
        return matrix[where[..., :, None], where[..., None, :]].mean(0)
    columns = whole.V.flatten(0, 1)[:, where.to(whole.V.device)]  # [N·k, m, k, s]
    stacked = columns.movedim(2, 0).flatten(1, 2)
    return stacked.mT @ stacked / (whole.n * len(where))
