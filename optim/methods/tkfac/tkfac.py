"""TKFAC: one Kronecker product per Fisher block, with the block's own trace.

Source: Gao et al. 2020, arXiv:2011.10741.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...capture.closures import run
from ...capture.likelihoods import LIKELIHOODS
from ...capture.per_example import examples_of
from ...core import settings as checks
from ...core.harness import Harness
from ...core.inversions import Job
from ...core.momentum import average
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.operators import Kronecker, Operator, by_group
from ...linalg.products import sandwich
from .formulas import balanced_inverse, learn_moments, trace, warm_moments

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")


class TKFAC(Optimizer):
    """Kronecker-factored curvature of the right trace: W_bar <- W_bar - lr L_inv M R_inv.

    The curvature is L ⊗ R / δ with L = E_n[V_n V_nᵀ], R = E_n[V_nᵀ V_n], V_n the gradient of one
    example, summed over its positions; δ = tr L = tr R is the trace of the Fisher block, and so is
    that of the product. With one position L = E[‖ã‖² g gᵀ], R = E[‖g‖² ã ãᵀ], δ = E[‖ã‖² ‖g‖²].
    For the step δ is shared out so that both factors have the same mean eigenvalue, i = in+1:
    L_inv = (√(out / (i δ)) L + √damping I)⁻¹, R_inv = (√(i / (out δ)) R + √damping I)⁻¹,
    refreshed at every step up to number `refresh_every` and then at each multiple of it. L and R
    are running averages.
    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball learning
    rates (m <- 0.9 m + ∇) differ by a factor of ten. Parameters outside Linear and Conv2d take
    lr M; `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. Labels are
    sampled inside the forward of `model` on update steps, from a generator of the optimizer's
    own (seeded from torch.initial_seed()), so the model is called itself, not its parts. For
    micro-batches of m_i out of M examples scale each loss by m_i / M. On update steps layer
    inputs and their gradients, of all micro-batches, are kept until the step.

    model: dimension 0 of every layer's input is the batch; it returns a tensor.
    lr: step size, >= 0.  damping: λ > 0 of the product, √λ on each factor.
    momentum, decay: of M, and of L and R, in [0, 1).
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²), or "empirical": the gradients of the data's labels.
        Sampled ones are of a loss summed over outputs and positions and averaged over examples.
    update_every, refresh_every: steps between updates of L and R, and between inversions.
    stagger: share a period's inversions out over its steps, so that none is much slower.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each weight: L, L_inv [out, out]; R, R_inv [in+1, in+1]; momentum [out, in+1]; counts,
    in the order of `COUNTS`; failures in a row; after an axis of groups in grouped convolutions.
    Factors are float32, or float64 for float64 parameters. The number of steps is
    param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    NumericalError if a factor cannot be inverted three times in a row.
    Source: arXiv:2011.10741 for the idea; how δ and the damping are shared out, several positions,
    lr and damping (KFAC's) are our choice.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = TKFAC(model, lr=0.3, damping=0.1, likelihood="gaussian")
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
        lr: float = 1.0,
        damping: float = 3.0,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        stagger: bool = False,
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
            "likelihood": likelihood,
            "update_every": update_every,
            "refresh_every": refresh_every,
            "stagger": stagger,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.choice("likelihood", likelihood, [*LIKELIHOODS, "empirical"])
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, average)
        self._harness.sample(likelihood)
        self._schedule()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError naming a layer whose statistics are missing or do not fit;
        NumericalError after three failed inversions in a row.
        """
        harness = self._harness
        loss = None if closure is None else run(closure)
        if not harness.begin():
            return loss
        with harness.exact():
            live = harness.live()
            self._learn(live)
            for stack, blocks in live.items():
                ok = harness.absorb(stack, blocks)
                P = sandwich(stack["L_inv"], stack["momentum"], stack["R_inv"])
                harness.move(stack, blocks, P, ok)
            harness.plain_steps()
        harness.end()
        self._schedule()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the statistics gathered with them."""
        super().zero_grad(set_to_none)
        self._harness.capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start L and R from their means over batches, before step 1.

        closures: each runs the model on one batch (and, for likelihood="empirical", backward).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        harness = self._harness
        accumulate = examples_of(harness.setting("likelihood"))
        with torch.no_grad():
            for batch, found in warming(harness, closures, accumulate, eager=not harness.delivers):
                with harness.exact():
                    for stack, totals in found.items():
                        warm_moments(stack, totals, batch, 1.0 if harness.delivers else None)
            for stack in harness.stacks:
                harness.start(stack, stack.blocks)
            with harness.exact():
                self._refresh()

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave L, R and their inverses as they are; no labels are sampled."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: L_inv ⊗ R_inv}, live views of what the last step applied.

        Raises: RuntimeError before there is a state.
        """
        return self._products(lambda stack: (stack["L_inv"], stack["R_inv"]))

    def curvature(self) -> dict[str, Operator]:
        """{module name: L ⊗ (R / δ)}, the undamped Fisher blocks.

        Raises: RuntimeError before there is a state.
        """
        return self._products(lambda stack: (stack["L"], stack["R"] / trace(stack["R"])))

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; layers move to the group of their weight."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with the state of the label generator under "labels"."""
        return {**super().state_dict(), **self._harness.extra_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, factors in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._schedule()

    def _schedule(self) -> None:
        """Capture on update steps only."""
        self._harness.schedule(examples_of(self._harness.setting("likelihood")))

    def _learn(self, live: dict[Stack, list]) -> None:
        """Statistics of an update step, and the inverses that are due."""
        harness = self._harness
        if harness.capture.accumulate is not None:
            scale = harness.scale if harness.delivers else None
            for stack, totals in harness.collected(live).items():
                ok = learn_moments(stack, totals, scale)
                harness.start(stack, totals)
                harness.learned(stack, ok, totals)
        harness.ready(live)
        if not harness.is_frozen:
            self._refresh()

    def _refresh(self) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        harness, jobs = self._harness, []
        for stack in harness.stacks:
            if stack.started:
                (out, columns), root = stack.shape, stack.group["damping"] ** 0.5
                left = partial(balanced_inverse, ratio=out / columns)
                right = partial(balanced_inverse, ratio=columns / out)
                jobs.append(Job(stack, "L", "L_inv", left, root))
                jobs.append(Job(stack, "R", "R_inv", right, root))
        harness.refresh(jobs, all_until=harness.setting("refresh_every") + 1)

    def _products(self, factors: Callable[[Stack], tuple[Tensor, Tensor]]) -> dict[str, Operator]:
        maps: dict[str, Operator] = {}
        for stack, block in self._harness.started():
            left, right = (factor[stack.places[block]] for factor in factors(stack))
            pairs = zip(left, right, strict=True)
            maps[block.name] = by_group([Kronecker(L, R) for L, R in pairs])
        return maps
