"""Mini-blocks of a layer's weight: statistics, inverses and products of MBF.

Of a Linear layer one for all rows; of a convolution one per kernel and per bias (arXiv:2202.04124).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...core.momentum import gradient_of
from ...core.stacks import Stack
from ...linalg.basics import damped_inverse, is_finite
from ...linalg.operators import BlockDiagonal, Kronecker, Operator
from ...linalg.products import faster_library, gram_


def slices(block: Block, W: Tensor) -> dict[str, Tensor]:
    """Views of W [size, out, in+1] by name of the mini-blocks, [size, q.., r, n].

    q: axes with a mini-block each. r: number of slices [n] that share a mini-block.
    """
    if not block.convolutional:
        return {"M": W}
    size, kernel = block.inputs, block.weight[0, 0].numel()
    found = {"M": W[..., :size].unflatten(-1, (-1, kernel)).unsqueeze(-2)}
    if block.bias is not None:
        found["M_bias"] = W[..., size:].unsqueeze(-2)
    return found


def moments(block: Block, G: Tensor) -> dict[str, Tensor]:
    """Mean of g_s g_sᵀ over the slices of each mini-block, [size, q.., n, n], by name.

    G: gradient of W_bar [size, out, in+1].
    """
    found = {}
    for name, g in slices(block, G).items():
        r, n = g.shape[-2:]
        M = torch.zeros(*g.shape[:-2], n, n, dtype=g.dtype, device=g.device)
        gram_(M.flatten(0, -3), g.flatten(0, -3), beta=1.0, alpha=1 / r)
        found[name] = M
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
    """Whether the sum of squares of all gradients is finite; waits for a GPU."""
    grads = [gradient_of(p) for block in blocks for p in block.parameters]
    norms = [torch.linalg.vector_norm(g, dtype=dtype).item() for g in grads]
    return sum(norm * norm for norm in norms) <= torch.finfo(dtype).max  # no NaN is


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


def applied(stack: Stack) -> Tensor:
    """P M [size, out, in+1] with slices (M_s + λI)⁻¹ m_s, m the momentum."""
    m, block = stack["momentum"], stack.blocks[0]
    P = torch.empty_like(m)
    outs = slices(block, P)
    for name, v in slices(block, m).items():
        inverse, out = stack[f"{name}_inv"], outs[name]
        if block.convolutional:
            v, out = v.squeeze(-2).unsqueeze(-1), out.squeeze(-2).unsqueeze(-1)
            torch.matmul(inverse, v, out=out)
        else:
            with faster_library(v, v.numel() * inverse.shape[-1]):
                torch.bmm(v, inverse, out=out)
    return P


def operator(stack: Stack, block: Block, suffix: str = "") -> Operator:
    """Block-diagonal matrix of a layer's mini-blocks on the row-major vec(W_bar), live views."""
    M = stack.of(block, f"M{suffix}")
    if not block.convolutional:
        eye = torch.eye(block.shape[0], dtype=M.dtype, device=M.device)
        return Kronecker(eye, M[0])
    parts = [list(M.flatten(0, 1))]  # of each output first its kernels, then its bias
    if block.bias is not None:
        parts.append([one[None] for one in stack.of(block, f"M_bias{suffix}").flatten(0, 1)])
    return BlockDiagonal([one for row in zip(*parts, strict=True) for part in row for one in part])
