"""Mini-blocks: exact sub-blocks of a layer's curvature, cut by output, input or kernel slice."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..exact import truth as truth_of
from ..operators import BlockDiagonal, Kronecker, Operator, dense
from ..operators.batched import Diagonals
from ..problem import Block, Problem
from ..registry import approximation
from ..truths.kronecker_terms import KroneckerTerms, output_blocks
from ..truths.low_rank_terms import LowRankTerms
from ._terms import EVERY_BLOCK

HELD_UP_TO = 2**22  # entries of all output blocks together

Method = Callable[[Problem, Block, str], Operator]


def cut(
    needs: str, places: Callable[[Block], tuple[Tensor, ...] | None], *exact_on: str
) -> Callable[[Callable[..., Operator]], Method]:
    """Register a cut (truth, *places) -> Operator as an approximation (problem, block, of).

    places: the coordinates of a block's entries; None where the block has no such cut.
    """

    def register(made: Callable[..., Operator]) -> Method:
        name = made.__name__

        def method(problem: Problem, block: Block, of: str = "ggn") -> Operator:
            if (where := places(block)) is None:
                kinds = [type(problem.model.get_submodule(m.module)) for m in block.members]
                raise ValueError(
                    f"{name} needs {needs}; block '{block.name}' is (a part of) "
                    f"{' + '.join(kind.__name__ for kind in kinds)}; {EVERY_BLOCK}"
                )
            return made(truth_of(problem, block, of), *where)

        method.__name__ = method.__qualname__ = name
        method.__doc__ = f"{made.__doc__}\n    Raises: ValueError for a block without {needs}."
        reference = "Bahamou, Goldfarb and Ren 2023 (arXiv:2202.04124), section 3"
        return approximation(reference=reference, exact_on=exact_on)(method)

    return register


def _matrix(block: Block) -> tuple[Tensor] | None:
    """Coordinates of the entries of [W, b] in its row-major vector, [out, in+1]."""
    member = block.single
    if member is None or not member.w_bar:
        return None
    return (torch.arange(member.d).reshape(member.matrix_shape),)


def _slices(block: Block) -> tuple[Tensor, Tensor] | None:
    """Coordinates of a convolution's kernel slices [out, in, kernel] and biases [out, 0 or 1]."""
    member = block.single
    if member is None or not member.w_bar or len(member.shapes[0]) < 3 or member.columns:
        return None
    _, channels, *kernel = member.shapes[0]
    width = channels * torch.Size(kernel).numel()
    where = torch.arange(member.d).reshape(member.matrix_shape)
    return where[:, :width].unflatten(1, (channels, -1)), where[:, width:]


MATRIX = ("a Linear layer or a convolution", _matrix)
KERNELS = ("a convolution and all kernels of its output channels", _slices)


@cut(*MATRIX, "last_layer_mse", "scalar_input_mse")
def mini_block(truth: Operator, rows: Tensor) -> Operator:
    """Exact sub-blocks [in+1, in+1] of the OUTPUT neurons or channels, the rows of [W, b].

    With one row a_n per example that of o is mean_n C_n[o, o] a_n a_nᵀ. Above 32 MiB the same
    matrix is given as (1/N) Σ_n diag(C_n) ⊗ a_n a_nᵀ. `mini_block_kernel` cuts convolutions finer.
    """
    if not isinstance(truth, KroneckerTerms):
        return BlockDiagonal(mean_sub_blocks(truth, rows[None]))
    if rows.numel() * rows.shape[1] > HELD_UP_TO:
        return KroneckerTerms(truth.a, Diagonals(truth.left.diagonals()))
    return BlockDiagonal(output_blocks(truth))


@cut(*MATRIX, "last_layer_mse", "scalar_input_mse")
def mini_block_shared(truth: Operator, rows: Tensor) -> Operator:
    """Mean M of the output neurons' sub-blocks, shared by all: I_out ⊗ M.

    M [in+1, in+1] = (1/out) Σ_o (block of o); with one row a_n per example it is
    mean_n (tr C_n / out) a_n a_nᵀ. What Mini-Block Fisher keeps per fully connected layer.
    """
    if isinstance(truth, KroneckerTerms):
        weights = truth.left.diagonals().mean(1)
        shared = (truth.a * weights[:, None]).T @ truth.a / truth.n
    else:
        shared = mean_sub_blocks(truth, rows[:, None])[0]
    return Kronecker(torch.eye(len(rows)).to(shared), shared)


@cut(*MATRIX, "scalar_input_mse")
def mini_block_input(truth: Operator, rows: Tensor) -> Operator:
    """Exact sub-blocks [out, out] of the INPUT neurons, the columns of [W, b].

    With one row a_n per example that of i is mean_n a_n[i]² C_n; a column of a convolution is one
    entry of its patches.
    """
    if isinstance(truth, KroneckerTerms):
        blocks = truth.left.weighted(truth.a.T.square() / truth.n)
    else:
        blocks = mean_sub_blocks(truth, rows.T[None])
    return BlockDiagonal(blocks, rows.T.reshape(-1).to(blocks.device))


@cut(*MATRIX, "scalar_input_mse")
def mini_block_input_shared(truth: Operator, rows: Tensor) -> Operator:
    """Mean N of the input neurons' sub-blocks, shared by all: N ⊗ I_{in+1}.

    N [out, out] = (1/(in+1)) Σ_i (block of i); with one row a_n per example it is
    mean_n (‖a_n‖² / (in+1)) C_n.
    """
    if isinstance(truth, KroneckerTerms):
        shared = truth.left.weighted(truth.a.square().mean(1)[None] / truth.n)[0]
    else:
        shared = mean_sub_blocks(truth, rows.T[:, None])[0]
    return Kronecker(shared, torch.eye(rows.shape[1]).to(shared))


@cut(*KERNELS)
def mini_block_kernel(truth: Operator, slices: Tensor, biases: Tensor) -> Operator:
    """Exact sub-blocks [kh·kw, kh·kw] of a convolution's kernel slices w_{o,i}, and of each bias.

    mean_n Σ_k d dᵀ with d_{nk,o,i} = Σ_t b_{nk,t,o} patch_{n,i,t}, for the truths that have roots
    b. Row-major: each output channel's bias follows its slices. Convolutions in any number of
    dimensions and groups, every truth. What Mini-Block Fisher keeps per convolution.
    """
    blocks = mean_sub_blocks(truth, slices.flatten(0, 1)[None])
    if not biases.numel():
        return BlockDiagonal(blocks)
    rows = zip(
        blocks.unflatten(0, slices.shape[:2]), mean_sub_blocks(truth, biases[None]), strict=True
    )
    return BlockDiagonal([part for row, bias in rows for part in (*row, bias)])


@cut(*KERNELS)
def mini_block_kernel_shared(truth: Operator, slices: Tensor, biases: Tensor) -> Operator:
    """Kernel slices' sub-blocks averaged over outputs: I_out ⊗ blockdiag(M_1, ..., β).

    M_i [kh·kw, kh·kw] is the mean over o of the blocks of w_{o,i}, β that of the biases' 1 x 1
    blocks: out times less to keep and to invert than `mini_block_kernel`. In groups, slices at the
    same place of their group share.
    """
    shared = [*mean_sub_blocks(truth, slices)]
    if biases.numel():
        shared += [*mean_sub_blocks(truth, biases[:, None])]
    right = torch.block_diag(*shared)
    return Kronecker(torch.eye(len(slices)).to(right), right)


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
