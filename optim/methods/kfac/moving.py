"""The parameters that a rescaled step moves, each with its gradient and its last step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...core.base import Live
from ...core.harness import Harness
from ...core.momentum import gradient_of, gradients_finite
from ...core.stacks import Stack
from ...linalg.basics import all_finite, factor_dtype, known_true, per


@dataclass(eq=False)
class Moving:
    """A parameter with its gradient and last step, of one shape (layers: an axis of groups first).

    gradient: with the L2 term, zero where `ok` is not. held: its last step, a view of the state.
    """

    parameter: Tensor
    group: dict[str, Any]
    gradient: Tensor
    held: Tensor
    ok: Tensor

    @property
    def previous(self) -> Tensor:
        """The last step as a direction: zero where it may not move, and without momentum."""
        if not self.group["momentum"]:
            return torch.zeros_like(self.held)
        return self.held if known_true(self.ok) else self.held * self.ok


@dataclass(eq=False)
class Movings:
    """All moving parameters: of live layers, with ∇ [size, out, in+1] of each stack, and others."""

    live: Live
    gradients: dict[Stack, Tensor]
    layers: list[Moving]
    plain: list[Moving]

    @property
    def all(self) -> list[Moving]:
        """The layers' parts, then those without a layer."""
        return self.layers + self.plain


def gather(harness: Harness, live: Live, *, count: bool = False) -> Movings:
    """Every parameter with a gradient; count: gradients that are not finite."""
    gradients, layers = dict[Stack, Tensor](), list[Moving]()
    for stack, blocks in live.items():
        if "momentum" not in stack:
            stack.hold(momentum=stack.zeros(*stack.shape))
        ok = gradients_finite(stack, blocks)
        G = harness.gradient(stack, blocks)
        if not known_true(ok):
            G = G.nan_to_num_(0.0, 0.0, 0.0).mul_(per(ok, G))
            if count:
                harness.count(stack, {"not finite": ~ok & stack.mask(blocks)})
        gradients[stack] = G
        layers += _parts_of(stack, blocks, G, ok, harness.groups)
    return Movings(live, gradients, layers, _plain_parts(harness, count=count))


def _plain_parts(harness: Harness, *, count: bool) -> list[Moving]:
    """Parameters that have a gradient and no block."""
    parts = []
    inside = {p for block in harness.stack_of for p in block.parameters}
    for p, group in harness.groups.items():
        if p in inside or p.grad is None:
            continue
        state = harness.optimizer.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=factor_dtype(p))
            state["nonfinite"] = torch.zeros((), dtype=torch.int64, device=p.device)
        g = gradient_of(p).to(state["momentum"].dtype)
        ok = all_finite(g)
        if count:
            state["nonfinite"] += ~ok
        g = torch.add(g, p, alpha=group["weight_decay"]).nan_to_num_(0.0, 0.0, 0.0)
        parts.append(Moving(p, group, g.mul_(ok), state["momentum"], ok))
    return parts


def _parts_of(
    stack: Stack, blocks: list[Block], G: Tensor, ok: Tensor, groups: dict[Tensor, dict[str, Any]]
) -> list[Moving]:
    found = []
    for block in blocks:
        place = stack.places[block]
        held = block.parts(stack["momentum"][place])
        for (p, g), (_, last) in zip(block.parts(G[place]), held, strict=True):
            found.append(Moving(p, groups[p], g, last, per(ok[place], g).bool()))
    return found


def move_(part: Moving, delta: Tensor, previous: Tensor, c: Tensor, ok: Tensor) -> None:
    """The parameter and its held step, where that is finite."""
    step = delta * c[0] + previous * c[1]
    if not known_true(ok):
        step = torch.where(ok, step, 0.0)
    part.parameter.add_(step.reshape(part.parameter.shape), alpha=part.group["lr"])
    all_ok = part.ok & ok
    part.held.copy_(step if known_true(all_ok) else torch.where(all_ok, step, part.held))
