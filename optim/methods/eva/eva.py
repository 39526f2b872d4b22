"""Eva: rank-one curvature of each layer from the means of its inputs and gradients."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.blocks import Block
from ...capture.capture import Accumulate, Totals
from ...core.base import CurvatureOptimizer, Live
from ...core.momentum import gradients_finite
from ...core.stacks import Stack
from ...linalg.basics import finite, is_finite, known_true, learn_, per
from ...linalg.operators import ExampleSum, Operator, RankOneInverse, by_group
from .formulas import Direction, add_means, clip, means, rank_one_solve_


class Eva(CurvatureOptimizer):
    """Vectorized curvature: W_bar <- W_bar - lr m, m <- momentum m + ν Δ, per Linear and Conv2d.

    Δ = (∇ - (ḡᵀ ∇ x̄) / (‖x̄‖² ‖ḡ‖² + damping) ḡ x̄ᵀ) / damping
      = (damping I + ḡ ḡᵀ ⊗ x̄ x̄ᵀ)⁻¹ ∇,  ∇ with weight_decay W_bar,
    ν = min(1, √(kl_clip / Σ lr² ⟨Δ, ∇⟩)), the sum over all layers (and groups of a convolution).

    x̄ and ḡ are running averages of the means over batch and positions of the input x̃ and of the
    gradient of the MEAN loss at the output, m times smaller than the per-example one; with g_n the
    rank-one term would be m² times larger. Kept as published: damping is meant for this scale.
    The clip, made for preconditioned directions, neither counts nor scales parameters outside
    layers. `preconditioner()` is without ν: a step without momentum and weight decay changes a
    layer by -lr ν P ∇ with ν = `nu`, that of the last step.

    decay: of x̄ and ḡ; the published weight of the new is 0.95.
    kl_clip: bound on Σ (lr ν)² ⟨Δ, ∇⟩, > 0; None for no clip.

    State of each weight: x [in+1], g [out], the averages.
    Source: Zhang, Shi, Wang, Li 2023, arXiv:2308.02123, form and defaults of its published code
    (CIFAR-10, batch 128).
    """

    counts = ("updates", "not finite")
    heavy_ball = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        damping: float = 0.03,
        momentum: float = 0.9,
        decay: float = 0.05,
        weight_decay: float = 0.0,
        update_every: int = 1,
        *,
        kl_clip: float | None = 1e-3,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals())

    def curvature(self) -> dict[str, Operator]:
        """{module name: ḡ ḡᵀ ⊗ x̄ x̄ᵀ}, live views, ḡ of the mean loss as published."""

        def outer(stack: Stack, block: Block) -> Operator:
            rows = zip(*(stack.of(block, k)[:, None, None, None] for k in "gx"), strict=True)
            return by_group([ExampleSum(g, x) for g, x in rows])

        return self._operators(outer)

    def _check(self, settings: dict[str, Any]) -> None:
        kl_clip = settings["kl_clip"]
        if kl_clip is not None and not kl_clip > 0:
            raise ValueError(f"kl_clip must be positive, or None for no clip; got {kl_clip!r}")

    def _prepare(self) -> None:
        self._harness.delivers = True
        self.nu = torch.ones(())

    def _accumulate(self) -> Accumulate:
        return add_means

    def _learn(self, live: Live) -> None:
        self._learn_by(live, self._learn_means)

    def _learn_means(self, stack: Stack, totals: dict[Block, Totals]) -> Tensor:
        """x̄ and ḡ, unless one of the two is not finite; which learned, [size] bool."""
        x, g = means(stack, totals, self._harness.scale)
        ok = finite(x) & finite(g) & stack.mask(totals)
        for name, new in (("x", x), ("g", g)):
            learn_(stack[name], new, 1 - stack.group["decay"], ok)
        return ok

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        def average(stack: Stack, totals: dict[Block, Totals], batch: int) -> None:
            for name, new in zip("xg", means(stack, totals, 1.0), strict=True):
                stack[name].lerp_(new, 1 / batch)

        self._average_by(closures, add_means, average)

    def _operator(self, stack: Stack, block: Block) -> Operator:
        """(damping I + ḡ ḡᵀ ⊗ x̄ x̄ᵀ)⁻¹."""
        pairs = zip(stack.of(block, "g"), stack.of(block, "x"), strict=True)
        return by_group([RankOneInverse(g, x, stack.group["damping"]) for g, x in pairs])

    def _move(self, live: Live, learned: Any) -> None:  # noqa: ARG002
        directions = {stack: self._solve(stack, blocks) for stack, blocks in live.items()}
        self.nu = clip(self._harness.setting("kl_clip"), directions)
        for stack, found in directions.items():
            self._absorb(stack, found)
            m = self._direction(stack)
            if not known_true(found.ok):
                m = m.clone()  # which `move` spoils
            self._harness.move(stack, found.blocks, m, found.ok)
        self._harness.plain_steps()

    def _direction(self, stack: Stack) -> Tensor:
        """The momentum itself, which has ν Δ in it."""
        return stack["momentum"]

    def _solve(self, stack: Stack, live: list[Block]) -> Direction:
        """Δ from the gradient; gradients that are not finite are counted."""
        G = self._harness.gradient(stack, live)
        Delta, inner = rank_one_solve_(G, stack["g"], stack["x"], stack.group["damping"])
        mask, ok = stack.mask(live), is_finite(inner)
        if not known_true(ok):
            ok = ok & gradients_finite(stack, live)  # of the whole layer, not of one group alone
            self._harness.count(stack, {"not finite": ~ok & mask})
        return Direction(live, Delta, inner, ok & mask)

    def _absorb(self, stack: Stack, found: Direction) -> None:
        """Take m <- momentum m + ν Δ where that is finite."""
        m, keep = stack["momentum"], stack.group["momentum"]
        nu = self.nu.to(m.device, m.dtype)
        if known_true(found.ok):
            m.mul_(keep).addcmul_(found.Delta, nu)
            return
        weight = per(found.ok, m)
        Delta = found.Delta.nan_to_num_(0.0, 0.0, 0.0).mul_(weight)
        m.mul_(1 + weight * (keep - 1)).addcmul_(Delta, nu)
