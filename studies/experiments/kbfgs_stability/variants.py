"""Variants of K-BFGS that may cure its divergence, to be compared with `KBFGSLimited`.

They are not offered as optimizers: the study `cures` finds what they are worth. Those that look at
the loss of the second evaluation build on KBFGSLimited.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kronscope.optim import KBFGS, KBFGSLimited
from kronscope.optim.blocks import Block
from kronscope.optim.capture import Call, Totals, positions
from kronscope.optim.core import Stack
from kronscope.optim.linalg import damped_inverse
from kronscope.optim.methods.kbfgs import (
    acceptable,
    bfgs_,
    double_damping,
    input_action_,
    statistics,
    step_limit,
)

RAMP = 60  # steps: an epoch of MNIST in batches of 1,000
PARTS = 4  # of a batch

Live = dict[Stack, list[Block]]


class Undoing(KBFGSLimited):
    """Goes back where the loss on the same batch rose or is not finite, and clears the momentum."""

    def _kept(self, _: step_limit.Taken, loss: Tensor, after: Tensor) -> Tensor:
        return (after <= loss).to(loss.dtype)


class Trusting(KBFGSLimited):
    """Shortens a step d that plans to change the loss by more than a share of it.

    Planned is ⟨M, −d⟩, twice the decrease of the quadratic model that P M minimises at lr = 1; the
    share is given as curvature_limit.
    """

    def _kept(self, taken: step_limit.Taken, loss: Tensor, _: Tensor) -> Tensor:
        return step_limit.kept(taken.planned / loss.abs(), self._harness.setting("curvature_limit"))


class StepOnly(KBFGSLimited):
    """Shortens the step as KBFGSLimited does, and leaves the momentum as long as it was."""

    def _shorten(self, taken: step_limit.Taken, loss: Tensor, after: Tensor, live: Live) -> None:
        super()._shorten(replace(taken, momenta={}), loss, after, live)


class Ramped(KBFGS):
    """Learning rate k / RAMP of its own in step k, up to the whole of it."""

    def _iterate(self, closure: Callable[[], Tensor] | None) -> Tensor:
        share = min(1.0, (self._harness.step + 1) / RAMP)
        for group in self.param_groups:
            group["lr"] = share * self.defaults["lr"]
        return super()._iterate(closure)


class ScaledStart(KBFGS):
    """H_g starts at γ I with γ = s·y / y·y of the layer's first pair, if that is positive.

    Source: Nocedal and Wright 2006, eq. 6.20.
    """

    def _learn_h(
        self, stack: Stack, first: dict[Block, Totals], second: dict[Block, Totals]
    ) -> None:
        if self._harness.step == 0:
            (z, g), (z_new, g_new) = (statistics.point(stack, totals) for totals in (first, second))
            s, y = z_new - z, g_new - g
            gamma = (s * y).sum(-1) / (y * y).sum(-1)
            good = torch.isfinite(gamma) & (gamma > 0)
            stack["H_g"].mul_(torch.where(good, gamma, 1.0)[:, None, None])
        super()._learn_h(stack, first, second)


class InvertedInput(KBFGS):
    """H_a = (A + λ_A I)⁻¹, inverted at every step, in place of BFGS. Linear layers alone keep an A.

    Shows what it matters that one pair a step cannot follow A.
    """

    def _learn_h(
        self, stack: Stack, first: dict[Block, Totals], second: dict[Block, Totals]
    ) -> None:
        super()._learn_h(stack, first, second)
        _linear_alone(stack, "no A is kept that could be inverted")
        lambda_a, _ = self._dampings(stack)
        inverse, ok = damped_inverse(stack["A"], lambda_a)
        stack["H_a"].copy_(torch.where(ok[:, None, None], inverse, stack["H_a"]))


def _linear_alone(stack: Stack, lacks: str) -> None:
    if stack.convolutional:
        raise ValueError(f"of layers {[block.name for block in stack.blocks]} {lacks}")


def _means_of_parts(totals: Totals, call: Call, delivered: Tensor) -> None:
    """Of each of the PARTS of a batch: means of x̃, z [PARTS, 1, in+1], and of g as delivered."""
    block, m = call.block, len(call.x)
    if "x parts" in totals.means or block.convolutional or m < PARTS:
        raise ValueError(
            f"layer '{block.name}' cannot be learned in parts: it must be Linear, called once a "
            f"batch, with at least {PARTS} examples; got {m}"
        )
    x = torch.stack([positions.row_mean(block, part) for part in call.x.detach().chunk(PARTS)])
    W = block.weight if block.bias is None else torch.cat([block.weight, block.bias[:, None]], 1)
    sums = [part.flatten(0, -2).sum(0) * (m / len(part)) for part in delivered.chunk(PARTS)]
    totals.means |= {
        "x parts": x,
        "z parts": x @ W.detach().T,
        "g parts": torch.stack(sums)[:, None],
    }


class InParts(KBFGS):
    """H_g and H_a learn from each quarter of the batch first, then from the whole as KBFGS does.

    A part's pair (s, y) is not averaged over steps. Linear layers alone, one call per batch.
    """

    @staticmethod
    def _first(totals: Totals, call: Call, delivered: Tensor) -> None:
        _means_of_parts(totals, call, delivered)
        statistics.first(totals, call, delivered)

    @staticmethod
    def _second(totals: Totals, call: Call, delivered: Tensor) -> None:
        _means_of_parts(totals, call, delivered)
        statistics.second(totals, call, delivered)

    def _learn_h(
        self, stack: Stack, first: dict[Block, Totals], second: dict[Block, Totals]
    ) -> None:
        lambda_a, mu_2 = self._dampings(stack)
        for k in range(PARTS):
            x, z, g = (_part(stack, first, name, k) for name in "xzg")
            s, y = _part(stack, second, "z", k) - z, _part(stack, second, "g", k) - g
            pair = double_damping(s, y, stack["H_g"], mu_2)
            bfgs_(stack["H_g"], pair.s, pair.y, pair.valid & acceptable(pair.s, pair.y, g))
            input_action_(stack, x, lambda_a, first)
        super()._learn_h(stack, first, second)


def _part(stack: Stack, totals: dict[Block, Totals], name: str, k: int) -> Tensor:
    """Of part k the mean x̃, z or g, [size, ...]; g of the per-example loss, as z over positions."""
    share = {b: t.positions if name == "g" else 1.0 for b, t in totals.items()}
    return stack.gathered({b: t.means[f"{name} parts"][k] / share[b] for b, t in totals.items()})


VARIANTS: dict[str, Callable[..., Any]] = {
    "kbfgs_undoing": Undoing,
    "kbfgs_trusting": Trusting,
    "kbfgs_step_only": StepOnly,
    "kbfgs_ramped": Ramped,
    "kbfgs_scaled_start": ScaledStart,
    "kbfgs_inverted_input": InvertedInput,
    "kbfgs_in_parts": InParts,
}
