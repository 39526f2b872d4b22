"""Eva: curvature of rank one for each layer, from the means of its inputs and gradients.

Source: Zhang, Shi, Wang, Li 2023, arXiv:2308.02123, in the form of its published code.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...blocks.blocks import Block
from ...capture.closures import run
from ...core import settings as checks
from ...core.harness import Harness
from ...core.momentum import gradients_finite, heavy_ball
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.basics import finite, is_finite, known_true, learn_, per
from ...linalg.operators import ExampleSum, Operator, RankOneInverse, by_group
from .formulas import Direction, add_means, clip, means, rank_one_solve_

COUNTS = ("updates", "not finite")


class Eva(Optimizer):
    """Vectorized curvature: W_bar <- W_bar - lr m, m <- momentum m + ν Δ, per Linear and Conv2d.

    Δ = (∇ - (ḡᵀ ∇ x̄) / (‖x̄‖² ‖ḡ‖² + damping) ḡ x̄ᵀ) / damping
      = (damping I + ḡ ḡᵀ ⊗ x̄ x̄ᵀ)⁻¹ ∇,  ∇ with weight_decay W_bar,
    ν = min(1, √(kl_clip / Σ lr² ⟨Δ, ∇⟩)), the sum over all layers (and groups of a convolution).

    x̄ and ḡ are running averages of the means over batch and positions of the input x̃ and of the
    gradient of the MEAN loss at the output, m times smaller than the per-example one; with g_n the
    rank-one term would be m² times larger. Kept as published: damping is meant for this scale.
    The momentum is heavy-ball: averaging methods (KFAC) take learning rates ten times larger.
    Parameters outside such layers take m <- momentum m + ∇ and lr m; the clip, made for
    preconditioned directions, neither counts nor scales them. `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. For
    micro-batches of m_i out of M examples scale each loss by m_i / M.

    model: dimension 0 of every layer's input is the batch.
    lr: step size, >= 0.  damping: γ > 0.
    momentum, decay: of m, and of x̄ and ḡ, in [0, 1): the published weight of the new is 0.95.
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    update_every: steps between updates of x̄ and ḡ.
    kl_clip: bound on Σ (lr ν)² ⟨Δ, ∇⟩, > 0; None for no clip.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each weight: x [in+1], g [out], the averages; momentum [out, in+1]; counts, in the
    order of `COUNTS`; after an axis of groups in grouped convolutions. In float32, or float64
    for float64 parameters. `nu` is the last step's ν. The number of steps is
    param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it.
    Source: arXiv:2308.02123; defaults of its published code (CIFAR-10, batch 128).

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = Eva(model, lr=0.1, damping=0.3)
        >>> losses = []
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     loss = 0.5 * (model(x) - t).square().sum(1).mean()
        ...     loss.backward()
        ...     opt.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True
    """

    __reduce_ex__ = checks.no_copy

    _step_supports_amp_scaling = True

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
        settings = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "decay": decay,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "update_every": update_every,
            "kl_clip": kl_clip,
        }
        checks.common(settings)
        checks.periods(settings)
        if kl_clip is not None and not kl_clip > 0:
            raise ValueError(f"kl_clip must be positive, or None for no clip; got {kl_clip!r}")
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, heavy_ball)
        self._harness.delivers = True
        self.nu = torch.ones(())
        self._schedule()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError naming a layer whose statistics are missing or do not fit.
        """
        harness = self._harness
        loss = None if closure is None else run(closure)
        if not harness.begin():
            return loss
        with harness.exact():
            live = harness.live()
            self._learn(live)
            directions = {stack: self._direction(stack, b) for stack, b in live.items()}
            self.nu = clip(harness.setting("kl_clip"), directions)
            for stack, found in directions.items():
                self._move(stack, found)
            harness.plain_steps()
        harness.end()
        self._schedule()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the statistics gathered with them."""
        super().zero_grad(set_to_none)
        self._harness.capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start x̄ and ḡ from their means over batches, before step 1.

        closures: each runs the model on one batch, and backward. Parameters, .grad and buffers
        end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        harness = self._harness
        with torch.no_grad():
            for batch, found in warming(harness, closures, add_means, eager=False):
                for stack, totals in found.items():
                    x, g = means(stack, totals, scale=1.0)
                    stack["x"].lerp_(x, 1 / batch)
                    stack["g"].lerp_(g, 1 / batch)
            for stack in harness.stacks:
                harness.start(stack, stack.blocks)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave x̄ and ḡ as they are."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: (damping I + ḡ ḡᵀ ⊗ x̄ x̄ᵀ)⁻¹}, live views, without the clip's ν.

        A step without momentum and weight decay changes a layer by -lr ν P ∇ with ν = `nu`.

        Raises: RuntimeError before there is a state.
        """
        maps: dict[str, Operator] = {}
        for stack, block in self._harness.started():
            pairs = zip(stack.of(block, "g"), stack.of(block, "x"), strict=True)
            damping = stack.group["damping"]
            maps[block.name] = by_group([RankOneInverse(g, x, damping) for g, x in pairs])
        return maps

    def curvature(self) -> dict[str, Operator]:
        """{module name: ḡ ḡᵀ ⊗ x̄ x̄ᵀ}, live views, ḡ of the mean loss as published.

        Raises: RuntimeError before there is a state.
        """
        maps: dict[str, Operator] = {}
        for stack, block in self._harness.started():
            rows = zip(*(stack.of(block, k)[:, None, None, None] for k in "gx"), strict=True)
            maps[block.name] = by_group([ExampleSum(g, x) for g, x in rows])
        return maps

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; layers move to the group of their weight."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, averages in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._schedule()

    def _schedule(self) -> None:
        """Capture on update steps only."""
        self._harness.schedule(add_means)

    def _learn(self, live: dict[Stack, list[Block]]) -> None:
        """x̄ and ḡ of an update step, unless one of the two is not finite."""
        harness = self._harness
        if harness.capture.accumulate is not None:
            for stack, totals in harness.collected(live).items():
                mask = stack.mask(totals)
                x, g = means(stack, totals, harness.scale)
                ok = finite(x) & finite(g) & mask
                weight = 1 - stack.group["decay"]
                learn_(stack["x"], x, weight, ok)
                learn_(stack["g"], g, weight, ok)
                harness.start(stack, totals)
                harness.learned(stack, ok, totals)
        harness.ready(live)

    def _direction(self, stack: Stack, live: list[Block]) -> Direction:
        """Δ from the gradient; the gradients that are not finite are counted."""
        G = self._harness.gradient(stack, live)
        Delta, inner = rank_one_solve_(G, stack["g"], stack["x"], stack.group["damping"])
        mask, ok = stack.mask(live), is_finite(inner)
        if not known_true(ok):
            ok = ok & gradients_finite(stack, live)  # of the whole layer, not of one group alone
            self._harness.count(stack, {"not finite": ~ok & mask})
        return Direction(live, Delta, inner, ok & mask)

    def _move(self, stack: Stack, found: Direction) -> None:
        """Take m <- momentum m + ν Δ where that is finite, then W_bar <- W_bar - lr m."""
        m, keep = stack["momentum"], stack.group["momentum"]
        nu = self.nu.to(m.device, m.dtype)
        if known_true(found.ok):
            m.mul_(keep).addcmul_(found.Delta, nu)
            self._harness.move(stack, found.blocks, m, found.ok)
            return
        weight = per(found.ok, m)
        Delta = found.Delta.nan_to_num_(0.0, 0.0, 0.0).mul_(weight)
        m.mul_(1 + weight * (keep - 1)).addcmul_(Delta, nu)
        self._harness.move(stack, found.blocks, m.clone(), found.ok)  # it spoils what it is given
