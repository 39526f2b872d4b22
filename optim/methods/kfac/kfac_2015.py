"""KFAC2015: KFAC with exact rescaling and momentum, and damping adapted by Levenberg-Marquardt."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.closures import random_state, run
from ...capture.likelihoods import FISHER
from ...core import settings as checks
from ...core.base import Closure, CurvatureOptimizer, Live
from ...core.grad_scaler import refuse_scaler
from ...core.inversions import Job
from ...core.kronecker_factors import learn_factors, warm_factors
from ...core.levenberg_marquardt import LevenbergMarquardt
from ...core.stacks import Stack
from ...linalg.basics import damped_inverse, known_true
from ...linalg.products import sandwich
from .kfac import KFAC
from .rescaled_step import Batch, RescaledStep, check_groups

TINY = 1e-30  # a trace below it has no balance to keep


def trace_balance(A: Tensor, G: Tensor) -> Tensor:
    """π = √((tr A / dim A) / (tr G / dim G)), [b]: shares the damping out by the factors' sizes.

    Source: arXiv:1503.05671, section 6.3.
    """
    a = A.diagonal(dim1=-2, dim2=-1).mean(-1)
    g = G.diagonal(dim1=-2, dim2=-1).mean(-1)
    return (a.clamp_min(TINY) / g.clamp_min(TINY)).sqrt()


class KFAC2015(KFAC):
    """KFAC as published in 2015: W_bar <- W_bar + lr (α Δ + μ δ), Δ = -G_inv ∇ A_inv.

    δ is the last step, ∇ has the L2 term. α and μ minimise the quadratic model of the loss in
    that plane, with the exact Fisher matrix of the batch plus (λ + weight_decay) I; lr=1 takes
    the step whole. G_inv = (G + γ/π I)⁻¹, A_inv = (A + γ π I)⁻¹, π balances the factors' traces.
    λ = damping and γ = √(damping + weight_decay) at the start; `adaptive` changes both. The k-th
    update decays A and G by min(1 - 1/k, decay), the batches of `warm_up` among them. Parameters
    outside layers take part with Δ = -∇/γ².

    Each step takes step(closure) and evaluates it twice on one batch, every few steps three or four
    times. The loss must be that of `likelihood`, summed over outputs.

    lr: the same in all groups.
    momentum: 0 leaves δ out; any other value has the same effect, since μ is computed.
    adaptive: the constants of the Levenberg-Marquardt rules, None for its defaults.

    State of each weight: as of KFAC, momentum being δ; seen, the number of updates. The attribute
    `rescaling` holds α, μ, ρ and the adapted factors of λ and γ.
    Raises: ValueError for a likelihood without an exact Fisher matrix.
    Source: arXiv:1503.05671; defaults of its MNIST autoencoder, constants as we recall them.
    """

    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        name: (True, "it is always on; for a method without it use KFAC")
        for name in ("rescale", "pi", "growing_decay")
    }

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 150.0,
        momentum: float = 0.9,
        decay: float = 0.95,
        weight_decay: float = 1e-5,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        adaptive: LevenbergMarquardt | None = None,
        stagger: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        arguments = locals() | {
            "adaptive": asdict(adaptive or LevenbergMarquardt()),
            "decoupled_weight_decay": False,
        }
        CurvatureOptimizer.__init__(self, model, groups, arguments)

    @property
    def rescaling(self) -> dict[str, Tensor]:
        """Live 0-d tensors: "alpha", "mu", "rho" of the last step, NaN before; "lambda", "gamma".

        The two dampings are multiplied by "lambda" and "gamma" now.
        """
        return self._rescaled.state

    def _check(self, settings: dict[str, Any]) -> None:
        if settings["likelihood"] not in FISHER:
            raise ValueError(
                f"KFAC2015 needs the exact Fisher matrix of the model's own likelihood, one of "
                f"{list(FISHER)}; got likelihood={settings['likelihood']!r}"
            )
        if settings["adaptive"] is None:
            raise ValueError("KFAC2015 adapts its damping; a state of adaptive=None has no place")

    def _prepare(self) -> None:
        self._rescaled = RescaledStep(self._harness, self._preconditioned)

    def _own_state(self) -> dict[str, Any]:
        return {"rescaling": dict(self.rescaling)}

    def _take_own_state(self, state_dict: dict[str, Any]) -> None:
        for name, value in state_dict["rescaling"].items():
            self.rescaling[name].copy_(value)

    def _iterate(self, closure: Closure | None) -> Tensor:
        refuse_scaler(self)
        closure, harness = checks.needed(closure, "KFAC2015"), self._harness
        check_groups(self.param_groups)
        start = random_state(harness.model)
        batch = Batch(closure, start, run(closure))
        harness.begin()
        live = harness.live()
        with harness.exact():
            self._learn(live)
        self._rescaled.search(batch, live)
        if not harness.is_frozen:
            self._refresh()
        self._rescaled.move(batch, live)
        self._end()
        return batch.loss

    def _learn(self, live: Live) -> None:
        """A and G; inverses wait for γ, which is searched for with these factors."""
        harness = self._harness
        if harness.capture.accumulate is not None:
            for stack, totals in harness.collected(live).items():
                if "seen" not in stack:
                    stack.hold(seen=stack.zeros(dtype=torch.int64))
                # 1 - min(1 - 1/k, decay) for the k-th update
                weight = (stack["seen"] + 1).to(stack.dtype).reciprocal_()
                weight = weight.clamp_min_(1 - stack.group["decay"])
                ok = learn_factors(stack, totals, harness.scale, weight)
                stack["seen"].add_(ok)
                harness.start(stack, totals)
                harness.learned(stack, ok, totals)
        harness.ready(live)

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        def warm(stack: Stack, totals: dict[Block, Totals], batch: int) -> None:
            warm_factors(stack, totals, batch)
            stack.hold(seen=torch.full((stack.size,), batch, device=stack.device))

        self._average_by(closures, self._accumulate(), warm)

    def _inversions(self, stack: Stack, factor: float = 1.0) -> tuple[Job, ...]:
        """The inversions of A and G, damped by `factor` times the present γ."""
        pi = trace_balance(stack["A"], stack["G"])
        gamma = self._rescaled.gamma(stack.group) * factor
        return (
            Job(stack, "A", "A_inv", damped_inverse, gamma * pi, setting=gamma),
            Job(stack, "G", "G_inv", damped_inverse, gamma / pi, setting=gamma),
        )

    def _preconditioned(self, stack: Stack, M: Tensor, factor: float | None) -> Tensor:
        """G_inv M A_inv, by the inverses held or by those of `factor` times γ."""
        if factor is None:
            return sandwich(stack["G_inv"], M, stack["A_inv"])
        A, G = (_tried(job) for job in self._inversions(stack, factor))
        return sandwich(G, M, A)


def _tried(job: Job) -> Tensor:
    """The result of a job that is not kept; NaN where there is none."""
    result, ok = job.solver(job.M, job.dampings())
    return result if known_true(ok) else torch.where(ok[:, None, None], result, torch.nan)
