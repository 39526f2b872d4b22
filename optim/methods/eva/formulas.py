"""The formulas of Eva: means, rank-one solve and clip, batched over a stack."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture import positions
from ...capture.capture import Call, Totals
from ...core.stacks import Stack
from ...linalg.basics import running_mean


class Direction(NamedTuple):
    """Δ [size, out, in+1] of a stack's blocks; ⟨Δ, ∇⟩ [size]; where both are finite, [size]."""

    blocks: list[Block]
    Delta: Tensor
    inner: Tensor
    ok: Tensor


def rank_one_solve_(G: Tensor, g: Tensor, x: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Δ = (G - c g xᵀ) / damping, c = gᵀ G x / (‖g‖² ‖x‖² + damping), in place of G; and ⟨Δ, G⟩.

    G [s, out, in+1], g [s, out], x [s, in+1] -> [s, out, in+1] and [s]. It is
    (damping I + u uᵀ)⁻¹ vec G with u = g ⊗ x, so that uᵀ vec Δ = c and
    ⟨Δ, G⟩ = damping ‖Δ‖² + c², whose terms are positive: nothing cancels.
    Source: arXiv:2308.02123.

        >>> one = torch.ones(1, 1)
        >>> Delta, inner = rank_one_solve_(torch.ones(1, 1, 1), one, one * 3**0.5, 1.0)
        >>> round(Delta.item(), 6), round(inner.item(), 6)  # one eigenvalue 1 + 3
        (0.25, 0.25)
    """
    p = (g[:, None] @ (G @ x[:, :, None]))[:, 0, 0]
    c = p / (g.square().sum(1) * x.square().sum(1) + damping)
    Delta = G.baddbmm_(g[:, :, None], (x * (-c / damping)[:, None])[:, None], beta=1 / damping)
    return Delta, damping * torch.linalg.vector_norm(Delta, dim=(1, 2)).square() + c.square()


def clip(kl_clip: float | None, directions: dict[Stack, Direction]) -> Tensor:
    """ν = min(1, √(kl_clip / Σ lr² ⟨Δ, ∇⟩)), 0-d; 1 for None."""
    parts = [
        torch.where(found.ok, found.inner, 0).sum() * stack.group["lr"] ** 2
        for stack, found in directions.items()
    ]
    if not parts:
        return torch.ones(())
    total = sum((part.to(parts[0].device) for part in parts[1:]), parts[0])
    one = torch.ones_like(total)
    return one if kl_clip is None else (kl_clip / total).sqrt().minimum(one)


def add_means(totals: Totals, call: Call, delivered: Tensor) -> None:
    """means["x"]: mean over rows of x̃, [groups, in+1]; ["g"]: SUM over rows of g, [groups, out].

    delivered is g_n / M under a mean loss, as the published ḡ wants it.
    """
    if not call.counted:
        new = positions.row_mean(call.block, call.x)
        totals.means["x"] = running_mean(totals.means.get("x"), new, call.rows, totals.rows)
    g = call.gradients(delivered).sum((1, 2))
    totals.means["g"] = totals.means["g"] + g if "g" in totals.means else g


def means(stack: Stack, totals: dict[Block, Totals], scale: float) -> tuple[Tensor, Tensor]:
    """x̄ [size, in+1] and ḡ [size, out]; scale: what the loss was multiplied with."""
    x = stack.gathered({block: total.means["x"] for block, total in totals.items()})
    g = stack.gathered({b: total.means["g"] / (total.rows * scale) for b, total in totals.items()})
    if "x" not in stack:
        stack.hold(x=stack.zeros(*x.shape[1:]), g=stack.zeros(*g.shape[1:]))
    return x, g
