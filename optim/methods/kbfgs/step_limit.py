"""Shorten steps along which the loss has more curvature than the preconditioner assumes. Ours.

κ = d·H d / ⟨M, −d⟩ of d = −lr P M is lr times a Rayleigh quotient of P H, found by the second
evaluation; where P has missed a direction, κ goes from 1 to hundreds within one or two steps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...core import distributed
from ...core.momentum import Groups, decoupled
from ...core.stacks import Stack

ROUNDING = 16.0  # units in the last place of the loss that a difference of two is taken to err by


@dataclass(frozen=True)
class Taken:
    """A step just taken: parameters before it and their M, ∇·d and ⟨M, −d⟩ (of no axes)."""

    before: dict[Tensor, Tensor]
    momenta: dict[Tensor, Tensor]
    slope: Tensor
    planned: Tensor


def remember(parameters: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Copies of the parameters that have a gradient, before they move."""
    return {p: p.clone() for p in parameters if p.grad is not None}


def undecayed_(before: dict[Tensor, Tensor], groups: Groups) -> dict[Tensor, Tensor]:
    """Take decoupled weight decay, no part of the plan, out of a move; what is to go in again.

    A parameter that did not move at all (its gradient was not finite) did not decay either.
    """
    decay = {}
    for p, start in before.items():
        if shrink := decoupled(groups[p]):
            decay[p] = start * (shrink * (p != start).any().to(p.dtype))
            p.add_(decay[p])
    return decay


def taken(
    before: dict[Tensor, Tensor], live: dict[Stack, list[Block]], state: Mapping[Tensor, Any]
) -> Taken:
    """What there is to know of the step from `before` to where the parameters are now.

    live: the layers that moved. state: the optimizer's, with the M of other parameters.
    """
    momenta: dict[Tensor, Tensor] = {}
    for stack, blocks in live.items():
        for block in blocks:
            momenta |= dict(block.parts(stack.of(block, "momentum")))
    momenta |= {p: state[p]["momentum"] for p in before if p not in momenta}
    slope, planned = [], []
    for p, start in before.items():
        d = (p - start).flatten()
        assert p.grad is not None
        gradient = p.grad.nan_to_num(0.0, 0.0, 0.0)  # a layer with such a gradient did not move
        slope.append(torch.dot(gradient.flatten().to(d.dtype), d))
        planned.append(-torch.dot(momenta[p].flatten().to(d.dtype), d))
    return Taken(before, momenta, torch.stack(slope).sum(), torch.stack(planned).sum())


def ratio(step: Taken, before: Tensor, after: Tensor) -> Tensor:
    """κ = d·H d / ⟨M, −d⟩, negative where the loss curves downwards; ∞ where it became infinite.

    before, after: the loss at both ends of the step, on the same batch; of several processes each
    has its own, and all take the mean. A difference within their rounding is none. 0 for a step
    that plans with no curvature and meets none (M = 0).
    """
    ends = torch.stack([before, after])
    distributed.add_up_(ends)
    before, after = ends / distributed.size()
    rise = after - before
    noise = ROUNDING * torch.finfo(rise.dtype).eps * before.abs()
    met = 2 * (rise - step.slope - noise).to(step.planned.dtype)
    found = torch.where(met > 0, met / step.planned.clamp(min=0), met / step.planned)
    return torch.where(torch.isfinite(rise), found.nan_to_num(0.0, torch.inf, 0.0), torch.inf)


def kept(ratio: Tensor, limit: float) -> Tensor:
    """min(1, limit / κ), the share of the step that stays; 0 for κ = ∞, 1 for negative κ."""
    return torch.where(ratio > limit, limit / ratio, 1.0)


def shorten_(step: Taken, share: Tensor) -> None:
    """θ <- θ + share·d and M <- share·M in place; a share of 1 changes nothing, bit for bit."""
    for p, start in step.before.items():
        p.copy_(torch.lerp(start, p, share.to(p.dtype)))
    for M in step.momenta.values():
        M.mul_(share.to(M.dtype))
