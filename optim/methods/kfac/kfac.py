"""KFAC: Fisher blocks G ⊗ A, inverted factor by factor.

Source: Martens, Grosse 2015, arXiv:1503.05671, in the form that the published code of
arXiv:2006.08877 compares with; convolutions as in Grosse, Martens 2016, arXiv:1602.01407.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...capture.closures import random_state, run
from ...capture.likelihoods import LIKELIHOODS
from ...core import settings as checks
from ...core.grad_scaler import refuse_scaler
from ...core.harness import Harness
from ...core.inversions import Job
from ...core.kronecker_factors import factors_of, learn_factors, warm_factors
from ...core.levenberg_marquardt import LevenbergMarquardt
from ...core.momentum import average
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.basics import damped_inverse, known_true
from ...linalg.operators import Kronecker, Operator, by_group
from ...linalg.products import sandwich
from .rescaled_step import Batch, RescaledStep, check, check_groups

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")
TINY = 1e-30  # a trace below it has no balance to keep


def trace_balance(A: Tensor, G: Tensor) -> Tensor:
    """π = √((tr A / dim A) / (tr G / dim G)), [b]: shares the damping out by the factors' sizes.

    Source: arXiv:1503.05671, section 6.3.
    """
    a = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    g = G.diagonal(dim1=-2, dim2=-1).mean(-1)
    return (a.clamp_min(TINY) / g.clamp_min(TINY)).sqrt()


class KFAC(Optimizer):
    """Kronecker-factored curvature: W_bar <- W_bar - lr G_inv M A_inv, per Linear and Conv2d.

    G_inv = (G + √damping/π I)⁻¹, A_inv = (A + π √damping I)⁻¹, π = 1 unless pi=True; refreshed at
    every step up to number `refresh_every` and then at each multiple of it. A and G are running
    averages; where weights are shared over positions A sums over them and G is their mean.
    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball learning
    rates (m <- 0.9 m + ∇) differ by a factor of ten. Parameters outside such layers take lr M;
    `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. Labels are
    sampled inside the forward of `model` on update steps, from a generator of the optimizer's
    own (seeded from torch.initial_seed()), so the model is called itself, not its parts. For
    micro-batches of m_i out of M examples scale each loss by m_i / M.

    model: dimension 0 of every layer's input is the batch; it returns a tensor.
    lr: step size, >= 0.  damping: λ > 0 of G ⊗ A, √λ on each factor.
    momentum, decay: of M, and of A and G, in [0, 1).
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²), or "empirical": the gradients of the data's labels.
        Sampled ones are of a loss summed over outputs and positions and averaged over examples.
    update_every, refresh_every: steps between updates of A and G, and between inversions.
    growing_decay: the k-th update decays A and G by min(1 - 1/k, decay), so that the first ones
        make plain means; the batches of `warm_up` count among them.
    pi: balance the damping by the factors' traces.
    rescale: W_bar <- W_bar + lr (α Δ + μ δ), Δ = -G_inv (∇ + weight_decay W_bar) A_inv, δ the last
        step: the best in that plane (momentum=0: on that line) by the exact Fisher matrix of the
        batch plus damping and weight_decay. lr=1 takes it whole. Parameters outside layers
        take part with Δ = -∇/damping. Needs step(closure), evaluated twice a step on one batch;
        the loss must be that of `likelihood`, summed over outputs.
    adaptive: LevenbergMarquardt() adapts both dampings from their start, λ = damping and
        √(λ + weight_decay) of the factors, by one evaluation more every few steps. The paper's:
        damping=150, weight_decay=1e-5, decay=0.95, growing_decay=True, pi=True. Needs
        rescale=True.
    stagger: share a period's inversions out over its steps, so that none is much slower.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each weight: A, A_inv [in+1, in+1]; G, G_inv [out, out]; momentum [out, in+1] (with
    rescale δ, M is not used); counts, in the order of `COUNTS`; failures in a row; seen, with
    growing_decay; after an axis of groups in grouped convolutions. `rescaling` holds α, μ and the
    adapted factors.
    Factors are float32, or float64 for float64 parameters. The number of steps is
    param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    NumericalError if a factor cannot be inverted three times in a row.
    Source: arXiv:1503.05671, sections 3-6; defaults as in the published code of
    arXiv:2006.08877 (MNIST autoencoder, loss summed over 784 pixels).

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = KFAC(model, lr=0.3, damping=0.1, likelihood="gaussian")
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
        growing_decay: bool = False,
        pi: bool = False,
        rescale: bool = False,
        adaptive: LevenbergMarquardt | None = None,
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
            "growing_decay": growing_decay,
            "pi": pi,
            "rescale": rescale,
            "adaptive": None if adaptive is None else asdict(adaptive),
            "stagger": stagger,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.choice("likelihood", likelihood, [*LIKELIHOODS, "empirical"])
        check(settings)
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, average)
        self._harness.sample(likelihood)
        self._rescaled = RescaledStep(self._harness, self._preconditioned)
        self._schedule()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError naming a layer whose statistics are missing or do not fit;
        NumericalError after three failed inversions in a row; with rescale=True TypeError without
        a closure and ValueError under a GradScaler.
        """
        harness = self._harness
        if harness.setting("rescale"):
            refuse_scaler(self)
            return self._step_in_plane(checks.needed(closure, "KFAC(rescale=True)"))
        loss = None if closure is None else run(closure)
        if not harness.begin():
            return loss
        with harness.exact():
            live = harness.live()
            self._learn(live)
            self._refresh()
            for stack, blocks in live.items():
                ok = harness.absorb(stack, blocks)
                P = sandwich(stack["G_inv"], stack["momentum"], stack["A_inv"])
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
        """Start A and G from their means over batches, as the papers do, before step 1.

        closures: each runs the model on one batch (and, for likelihood="empirical", backward).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        harness = self._harness
        likelihood = harness.setting("likelihood")
        accumulate, eager = factors_of(likelihood), likelihood != "empirical"
        with torch.no_grad():
            for batch, found in warming(harness, closures, accumulate, eager=eager):
                for stack, totals in found.items():
                    warm_factors(stack, totals, batch)
            for stack in harness.stacks:
                harness.start(stack, stack.blocks)
            self._refresh()

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave A, G and their inverses as they are; no labels are sampled."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: G_inv ⊗ A_inv}, live views of what the last step applied.

        Raises: RuntimeError before there is a state.
        """
        return self._products("G_inv", "A_inv")

    def curvature(self) -> dict[str, Operator]:
        """{module name: G ⊗ A}, the undamped Fisher blocks, live views.

        Raises: RuntimeError before there is a state.
        """
        return self._products("G", "A")

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; layers move to the group of their weight."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with the label generator's state as "labels", and `rescaling`."""
        own = {"rescaling": dict(self.rescaling)} if self._harness.setting("rescale") else {}
        return {**super().state_dict(), **self._harness.extra_state(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, factors in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        for name, value in state_dict.get("rescaling", {}).items():
            self.rescaling[name].copy_(value)
        self._schedule()

    def _schedule(self) -> None:
        """Capture on update steps only."""
        self._harness.schedule(factors_of(self._harness.setting("likelihood")))

    def _learn(self, live: dict[Stack, list]) -> None:
        """Statistics of an update step, and the inverses that are due."""
        harness = self._harness
        if harness.capture.accumulate is not None:
            for stack, totals in harness.collected(live).items():
                ok = learn_factors(stack, totals, harness.scale)
                harness.start(stack, totals)
                harness.learned(stack, ok, totals)
        harness.ready(live)

    def _refresh(self) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        harness = self._harness
        if not harness.is_frozen:
            jobs = [job for stack in harness.stacks if stack.started for job in self._jobs(stack)]
            harness.refresh(jobs, all_until=harness.setting("refresh_every") + 1)

    def _jobs(self, stack: Stack, factor: float = 1.0) -> tuple[Job, Job]:
        """The inversions of A and G, damped by `factor` times the present damping."""
        pi = trace_balance(stack["A"], stack["G"]) if self._harness.setting("pi") else 1.0
        gamma = self._rescaled.gamma(stack.group) * factor
        return (
            Job(stack, "A", "A_inv", damped_inverse, gamma * pi, setting=gamma),
            Job(stack, "G", "G_inv", damped_inverse, gamma / pi, setting=gamma),
        )

    def _step_in_plane(self, closure: Callable[[], Tensor]) -> Tensor:
        """The step of rescale=True; returns the loss before it."""
        harness, rescaled = self._harness, self._rescaled
        check_groups(self.param_groups)
        start = random_state(harness.model)
        batch = Batch(closure, start, run(closure))
        harness.begin()
        live = harness.live()
        with harness.exact():
            self._learn(live)
        rescaled.search(batch, live)
        with harness.exact():
            self._refresh()
        rescaled.move(batch, live)
        harness.end()
        self._schedule()
        return batch.loss

    def _preconditioned(self, stack: Stack, M: Tensor, factor: float | None) -> Tensor:
        """G_inv M A_inv, by the inverses held or by those of `factor` times the damping."""
        if factor is None:
            return sandwich(stack["G_inv"], M, stack["A_inv"])
        A, G = (_tried(job) for job in self._jobs(stack, factor))
        return sandwich(G, M, A)

    @property
    def rescaling(self) -> dict[str, Tensor]:
        """What rescale=True found last, live 0-d tensors.

        "alpha", "mu" of the last step, "rho" (NaN before the first); "lambda" and "gamma", by
        which the two dampings are multiplied now.
        """
        return self._rescaled.state

    def _products(self, left: str, right: str) -> dict[str, Operator]:
        maps = {}
        for stack, block in self._harness.started():
            pairs = zip(stack.of(block, left), stack.of(block, right), strict=True)
            maps[block.name] = by_group([Kronecker(G, A) for G, A in pairs])
        return maps


def _tried(job: Job) -> Tensor:
    """The result of a job that is not kept; NaN where there is none."""
    result, ok = job.solver(job.M, job.dampings())
    return result if known_true(ok) else torch.where(ok[:, None, None], result, torch.nan)
