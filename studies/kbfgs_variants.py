"""K-BFGS with cures of its divergence other than `KBFGS(curvature_limit=)`, to be compared with it.

None of them is offered as an optimizer: `studies.cures` finds what they are worth. Those that look
at the loss of the second evaluation are built with a limit, as KBFGS must be to do so.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from optim import KBFGS, kbfgs_statistics, step_limit
from optim.capture import Totals
from optim.layers import Block
from optim.linalg import damped_inverse
from optim.stacks import Stack

RAMP = 60  # steps: an epoch of MNIST in batches of 1,000

Live = dict[Stack, list[Block]]


class Undoing(KBFGS):
    """Goes back where the loss on the same batch rose or is not finite, and clears the momentum."""

    def _kept(self, _: step_limit.Taken, loss: Tensor, after: Tensor) -> Tensor:
        return (after <= loss).to(loss.dtype)


class Trusting(KBFGS):
    """Shortens a step d that plans to change the loss by more than a share of it.

    Planned is ⟨M, −d⟩, twice the decrease of the quadratic model that P M minimises at lr = 1; the
    share is given as curvature_limit.
    """

    def _kept(self, taken: step_limit.Taken, loss: Tensor, _: Tensor) -> Tensor:
        return step_limit.kept(taken.planned / loss.abs(), self._harness.setting("curvature_limit"))


class StepOnly(KBFGS):
    """Shortens the step as KBFGS does, and leaves the momentum as long as it was."""

    def _shorten(self, taken: step_limit.Taken, loss: Tensor, after: Tensor, live: Live) -> None:
        super()._shorten(replace(taken, momenta={}), loss, after, live)


class Ramped(KBFGS):
    """Learning rate k / RAMP of its own in step k, up to the whole of it."""

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One iteration; returns the loss before it."""
        share = min(1.0, (self._harness.step + 1) / RAMP)
        for group in self.param_groups:
            group["lr"] = share * self.defaults["lr"]
        return super().step(closure)


class ScaledStart(KBFGS):
    """H_g starts at γ I with γ = s·y / y·y of the layer's first pair, if that is positive.

    Source: Nocedal and Wright 2006, eq. 6.20.
    """

    def _learn_h(
        self, stack: Stack, first: dict[Block, Totals], second: dict[Block, Totals]
    ) -> None:
        if self._harness.step == 0:
            (z, g), (z_new, g_new) = (
                kbfgs_statistics.point(stack, totals) for totals in (first, second)
            )
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
        if stack.convolutional:
            names = [block.name for block in stack.blocks]
            raise ValueError(f"of layers {names} no A is kept that could be inverted")
        lambda_a, _ = self._dampings(stack)
        inverse, ok = damped_inverse(stack["A"], lambda_a)
        stack["H_a"].copy_(torch.where(ok[:, None, None], inverse, stack["H_a"]))


VARIANTS: dict[str, Callable[..., Any]] = {
    "kbfgs_undoing": Undoing,
    "kbfgs_trusting": Trusting,
    "kbfgs_step_only": StepOnly,
    "kbfgs_ramped": Ramped,
    "kbfgs_scaled_start": ScaledStart,
    "kbfgs_inverted_input": InvertedInput,
}
