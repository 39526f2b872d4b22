"""The formulas of TKFAC: moments of single gradients, and their balanced, damped inverses."""

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.per_example import mean_weight, pieces
from ...core import distributed
from ...core.stacks import Stack
from ...linalg.basics import damped_inverse
from ...linalg.products import gram_, product

TINY = 1e-30  # a trace below it counts as this


def add_moments_(L: Tensor, R: Tensor, a: Tensor, g: Tensor) -> None:
    """L += Σ_n V_n V_nᵀ [groups, out, out], R += Σ_n V_nᵀ V_n, with V_n = Σ_t g_nt ã_ntᵀ.

    One position: L = Σ ‖ã‖² g gᵀ, R = Σ ‖g‖² ã ãᵀ. A few: V_n V_nᵀ = g_nᵀ (ã_n ã_nᵀ) g_n by rows,
    without V_n.
    """
    positions = a.shape[2]
    if positions == 1:
        for out, rows, others in ((L, g, a), (R, a, g)):
            weighted = rows * torch.linalg.vector_norm(others, dim=-1, keepdim=True)
            gram_(out, weighted.flatten(1, 2), beta=1.0, alpha=1.0)
    elif positions < min(a.shape[3], g.shape[3]):
        for out, rows, others in ((L, g, a), (R, a, g)):
            mixed = product(product(others, others.mT), rows)
            out.baddbmm_(rows.flatten(1, 2).mT, mixed.flatten(1, 2))
    else:
        V = product(g.mT, a)
        gram_(L, V.mT.flatten(1, 2), beta=1.0, alpha=1.0)
        gram_(R, V.flatten(1, 2), beta=1.0, alpha=1.0)


def trace(M: Tensor) -> Tensor:
    """Traces of a stack, [b, 1, 1], no smaller than `TINY`."""
    return M.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(TINY)[:, None, None]


def balanced_inverse(M: Tensor, damping: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """(√(ratio / tr M) M + damping I)⁻¹ [b, n, n], and for which it worked, [b] bool.

    With δ = tr L = tr R and ratio out / (in+1) for L, its inverse for R, the factors multiply to
    L ⊗ R / δ and have the same mean eigenvalue, √(δ / (out (in+1))).

    By hand, 1 / (√(1 / 4) 4 + 2):
        >>> inverse, ok = balanced_inverse(torch.tensor([[[4.0]]]), torch.tensor([2.0]), 1.0)
        >>> inverse.item(), bool(ok)
        (0.25, True)
    """
    return damped_inverse(M * (ratio / trace(M)).sqrt_(), damping)


def moments(stack: Stack, totals: dict[Block, Totals], scale: float | None) -> dict[str, Tensor]:
    """L = E_n[V_n V_nᵀ] [size, out, out] and R = E_n[V_nᵀ V_n] [size, in+1, in+1] of the batch."""
    lefts, rights = {}, {}
    for block, total in totals.items():
        (out, columns), like = block.shape, total.kept[0].x
        L = like.new_zeros(block.groups, out, out)
        R = like.new_zeros(block.groups, columns, columns)
        for a, g in pieces(block, total):
            add_moments_(L, R, a, g)
        weight = mean_weight(total, scale)
        lefts[block], rights[block] = L.mul_(weight), R.mul_(weight)
        distributed.add_up_(L, R)
    return {"L": stack.gathered(lefts), "R": stack.gathered(rights)}
