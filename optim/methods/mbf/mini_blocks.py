"""Mini-blocks: a layer's W_bar cut into slices, and what MBF keeps of each slice's gradient.

A slice is a row or a column of a Linear layer's W_bar, a kernel of a convolution, or one of its
biases. Source: arXiv:2202.04124, section 3.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture import positions
from ...capture.capture import Totals
from ...capture.per_example import mean_weight, pieces
from ...core import distributed
from ...core.momentum import gradient_of
from ...core.stacks import Stack
from ...core.summary import readable
from ...linalg.basics import damped_inverse, factor_dtype, is_finite
from ...linalg.operators import BlockDiagonal, ColumnBlocks, Kronecker, Operator
from ...linalg.products import faster_library, gram_, product

CONV_SHARES = {"none": 0, "output": 1, "all": 2}  # of a kernel's axes (O, I)
ROOM = 4 * 10**9  # bytes of mini-blocks and inverses that unshared Linear layers may take in all


def rows(W: Tensor) -> Tensor:
    """[..., out, in+1] as slices [..., out, in+1]: one for each output."""
    return W


def columns(W: Tensor) -> Tensor:
    """[..., out, in+1] as slices [..., in+1, out]: one for each input."""
    return W.mT


def kernels(W: Tensor, size: int, kernel: int) -> Tensor:
    """[..., O, I * kh * kw (+1)] as slices [..., O, I, kh * kw], without the bias."""
    return W[..., :size].unflatten(-1, (-1, kernel))


def biases(W: Tensor, size: int) -> Tensor:
    """[..., O, size + 1] as slices [..., O, 1]: the last column."""
    return W[..., size:]


@dataclass(frozen=True)
class Cut:
    """How a stack's matrices are cut: slices(W [..., out, in+1]) is a view [..., q.., n] of W.

    name: of the mini-blocks [size, q.., n, n] among the stack's tensors. over: of the axes q so
    many, from the left, have one mini-block for all, the mean of theirs, and drop out of its shape.
    """

    name: str
    slices: Callable[[Tensor], Tensor]
    over: int

    def shape_of(self, W: tuple[int, ...]) -> tuple[int, ...]:
        """(q.., n, n) of one W_bar of this shape, with every slice's own mini-block."""
        *many, n = self.slices(torch.empty(W, device="meta")).shape
        return (*many, n, n)

    def blocks_shape(self, W: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the mini-blocks held of one W_bar of this shape."""
        return self.shape_of(W)[self.over :]

    def by_block(self, v: Tensor, lead: int) -> Tensor:
        """Slices [`lead` axes, q.., n] as [first, q.., rows, n], q the axes with blocks of theirs.

        rows: all other leading and shared axes, whose slices one mini-block serves.
        """
        return v.flatten(1, lead + self.over - 1).movedim(1, -2)

    def spread(self, M: Tensor, W: tuple[int, ...]) -> Tensor:
        """Mini-blocks held, [groups, ...], for every slice: a view [groups, q.., n, n]."""
        return M[(slice(None),) + (None,) * self.over].expand(len(M), *self.shape_of(W))


def cuts_of(stack: Stack, fc_group: str, fc_share: bool, conv_share: str) -> list[Cut]:
    """The cuts of a stack: one of Linear layers; kernels and, if there are any, biases."""
    block = stack.blocks[0]
    if not block.convolutional:
        return [Cut("M", {"output": rows, "input": columns}[fc_group], int(fc_share))]
    size, kernel = block.inputs, block.weight[0, 0].numel()
    found = [Cut("M", partial(kernels, size=size, kernel=kernel), CONV_SHARES[conv_share])]
    if block.bias is not None:
        found.append(Cut("M_bias", partial(biases, size=size), 0))
    return found


def add_moments_(total: Tensor, cut: Cut, V: Tensor) -> Tensor:
    """Total + Σ_n v_ns v_nsᵀ for every slice s, or its mean over s; V [b, m, out, in+1]."""
    v = cut.by_block(cut.slices(V), 2)
    share = V.shape[1] / v.shape[-2]
    gram_(total.flatten(0, -3), v.flatten(0, -3), beta=1.0, alpha=share)
    return total


def minibatch_moments(stack: Stack, cuts: list[Cut], G: Tensor) -> dict[str, Tensor]:
    """ĝ_s ĝ_sᵀ by the cuts' names, or their mean over slices; ĝ a slice of ∇ [size, out, in+1]."""
    found = {}
    for cut in cuts:
        total = stack.zeros(*cut.blocks_shape(stack.shape))
        found[cut.name] = add_moments_(total, cut, G[:, None])
    return found


def learn_rows_(M: Tensor, W: Tensor, b: Tensor | None, decay: float) -> None:
    """M <- decay M + (1 - decay) (1/out) ∇ᵀ ∇ in place for ∇ = [W, b], W [out, in], b [out].

    The bias is never appended to W: the product goes straight into the corner.
    """
    size, new = W.shape[1], (1 - decay) / len(W)
    gram_(M[None, :size, :size], W[None], beta=decay, alpha=new)
    if b is not None:
        border = M[size, :size]
        M[:size, size] = border.addmv_(W.T, b, beta=decay, alpha=new)
        M[size, size].mul_(decay).add_(b @ b, alpha=new)


def squares_finite(blocks: Iterable[Block], dtype: torch.dtype) -> bool:
    """Whether all gradients are finite and so is the sum of their squares; waits for a GPU."""
    grads = [gradient_of(p) for block in blocks for p in block.parameters]
    norms = [torch.linalg.vector_norm(g, dtype=dtype).item() for g in grads]
    return sum(norm * norm for norm in norms) <= torch.finfo(dtype).max  # no NaN is


def example_moments(
    block: Block, totals: Totals, cuts: list[Cut], scale: float
) -> dict[str, Tensor]:
    """Mean over examples of v_ns v_nsᵀ by the cuts' names, v_n the gradient of one example's loss.

    totals.kept holds the rows of the data's labels; scale: what the loss was multiplied with.
    """
    groups, (out, columns), found = block.groups, block.shape, {}
    for cut in cuts:
        found[cut.name] = totals.kept[0].x.new_zeros(groups, *cut.blocks_shape(block.shape))
    count = max(1, positions.PIECE // (groups * out * columns))
    for a, g in pieces(block, totals):
        if not block.convolutional and cuts[0].over and a.shape[2] == 1:
            add_weighted_(found["M"], cuts[0], a, g)
            continue
        for few_a, few_g in zip(a.split(count, 1), g.split(count, 1), strict=True):
            V = product(few_g.mT, few_a)
            for cut in cuts:
                add_moments_(found[cut.name], cut, V)
    weight = mean_weight(totals, scale)
    distributed.add_up_(*(total.mul_(weight) for total in found.values()))
    return found


def add_weighted_(total: Tensor, cut: Cut, a: Tensor, g: Tensor) -> None:
    """As above for one position each, no V formed: Σ_n ã_n ã_nᵀ mean_o g_no², or the reverse."""
    own, other = (a, g) if cut.slices is rows else (g, a)
    weighted = own * torch.linalg.vector_norm(other, dim=-1, keepdim=True)
    gram_(total, weighted.flatten(1, 2), beta=1.0, alpha=1 / other.shape[-1])


def mini_inverse(M: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """(M + damping I)⁻¹ for each of M [b, n, n], and for which it worked, [b] bool.

    Of numbers (n = 1), by hand:
        >>> inverse, ok = mini_inverse(torch.ones(1, 1, 1), torch.tensor([1.0]))
        >>> inverse.tolist(), ok.tolist()
        ([[[0.5]]], [True])
    """
    if M.shape[-1] > 1:
        return damped_inverse(M, damping)
    damped = M + damping[:, None, None]
    return damped.reciprocal(), (damped > 0).flatten() & is_finite(damped).flatten()


def applied(stack: Stack, cuts: list[Cut]) -> Tensor:
    """P [size, out, in+1] whose slices are (M_s + λI)⁻¹ m_s, m the momentum."""
    m = stack["momentum"]
    P = torch.empty_like(m)
    for cut in cuts:
        inverse, v, out = stack[f"{cut.name}_inv"], cut.slices(m), cut.slices(P)
        if cut.over == 0:
            torch.matmul(inverse, v.unsqueeze(-1), out=out.unsqueeze(-1))
        elif v.ndim == 3:
            with faster_library(v, v.numel() * inverse.shape[-1]):
                torch.bmm(v, inverse, out=out)
        else:
            out.copy_((cut.by_block(v, 1) @ inverse).movedim(-2, 1).reshape(v.shape))
    return P


def operator(stack: Stack, block: Block, cuts: list[Cut], suffix: str = "") -> Operator:
    """A layer's map on the row-major vec of W_bar, of its blocks by the cuts' names, live views."""
    parts = [stack.of(block, f"{cut.name}{suffix}") for cut in cuts]
    if block.convolutional:  # of each output first its kernels, then its bias
        each = [cut.spread(M, block.shape) for cut, M in zip(cuts, parts, strict=True)]
        outputs = [row for group in zip(*each, strict=True) for row in zip(*group, strict=True)]
        return BlockDiagonal([M for kernels, *bias in outputs for M in [*kernels, *bias]])
    M, by_row = parts[0][0], cuts[0].slices is rows
    if not cuts[0].over:
        return BlockDiagonal(M) if by_row else ColumnBlocks(M)
    out, size = (torch.eye(n, dtype=M.dtype, device=M.device) for n in block.shape)
    return Kronecker(out, M) if by_row else Kronecker(M, size)


def check_room(blocks: list[Block], fc_group: str) -> None:
    """Raise ValueError if the unshared mini-blocks of all Linear layers are too large to hold."""
    sizes = {}
    for block in blocks:
        if not block.convolutional:
            out, size = block.shape
            many, n = (out, size) if fc_group == "output" else (size, out)
            sizes[block.name] = 2 * many * n * n * factor_dtype(block.weight).itemsize
    if sum(sizes.values()) > ROOM:
        name = max(sizes, key=lambda name: sizes[name])
        raise ValueError(
            f"fc_share=False would hold {readable(sum(sizes.values()))} of mini-blocks and "
            f"inverses, more than {readable(ROOM)}; layer '{name}' alone takes "
            f"{readable(sizes[name])}; use fc_share=True, or the fc_group whose blocks are smaller "
            f"(now '{fc_group}')"
        )
