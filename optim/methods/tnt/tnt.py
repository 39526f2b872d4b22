"""TNT: the Fisher block of every parameter as the covariance of a tensor-normal gradient.

Source: Ren, Goldfarb 2021, arXiv:2106.02925, and its published code.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...capture.capture import NOT_WARM
from ...capture.closures import run
from ...capture.likelihoods import LIKELIHOODS
from ...capture.sampled_gradients import UNSEEN, add_gradient
from ...core import axes
from ...core import settings as checks
from ...core.harness import Harness
from ...core.inversions import Job
from ...core.momentum import heavy_ball
from ...core.stacks import Stack
from ...core.warm_up import warm_gradients, warming
from ...linalg.operators import Operator
from .covariances import CovarianceInverse, covariance

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")


class TNT(Optimizer):
    """Tensor-normal training: W <- W - lr (U_1 + damping I)⁻¹ M (U_2 + damping I)⁻¹.

    For every parameter by itself, of any layer. U_1 ⊗ U_2 is the covariance of a tensor-normal
    model of the mini-batch-mean gradient of sampled labels: H_i, running averages of that gradient
    contracted with itself over all axes but i, scaled so that all U_i have the same mean
    eigenvalue and tr(U_1 ⊗ U_2) = tr H_i. That is the Fisher block divided by the batch size, on
    which lr and damping therefore depend. A convolution's weight has three axes, (O, I/groups,
    kh*kw); biases, norms and whatever is no matrix have one, with the full n x n average. Axes
    longer than `max_axis` (a large vocabulary) get no matrix, U_i = I without damping; a parameter
    with such axes only takes lr M; `summary()` says which. Inverses are refreshed at every one of
    the first `refresh_every` steps and then at each multiple of it. M <- momentum M + ∇ is
    heavy-ball: the averages of KFAC and its kin want learning rates ten times larger.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. Labels are
    sampled inside the forward of `model` on update steps, from a generator of the optimizer's
    own (seeded from torch.initial_seed()), so the model is called itself, not its parts. For
    micro-batches of m_i out of M examples scale each loss by m_i / M.

    model: its output is one tensor whose dimension 0 is the batch.
    lr: step size, >= 0.  damping: ε > 0 added to each U_i.
    momentum, decay: of M, and of H_i, in [0, 1).
    weight_decay: W shrinks by lr * weight_decay; with decoupled_weight_decay=False
        weight_decay W is added to ∇ instead, never to the sampled gradients.
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²), or "empirical": the data's labels, from .grad as step
        finds it.
    update_every, refresh_every: steps between updates of H_i, and between inversions.
    stagger: share a period's inversions out over its steps, so that none is much slower.
    max_axis: length of an axis, >= 1, beyond which it gets no matrix.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each parameter: H_1, H_2, ... and inverse_1, inverse_2, ... [n_i, n_i]; momentum, of
    the parameter's entries; counts, in the order of `COUNTS`; failures in a row. Float32, or
    float64 for float64 parameters. The number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting, a sparse gradient, or a gradient that did not come from
    a call of the model; NumericalError if an inverse fails three times in a row.
    Source: arXiv:2106.02925; defaults as in its published code (MNIST autoencoder, loss summed
    over 784 pixels, batches of 1000).

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = TNT(model, lr=1e-3, likelihood="gaussian")
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
        lr: float = 1e-4,
        damping: float = 0.1,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        stagger: bool = False,
        decoupled_weight_decay: bool = True,
        max_axis: int = 8192,
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
            "max_axis": max_axis,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.at_least_one("max_axis", max_axis)
        checks.choice("likelihood", likelihood, [*LIKELIHOODS, "empirical"])
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, heavy_ball, axes.variables(max_axis))
        self._harness.sample(likelihood)
        self._schedule()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError naming a parameter whose sampled gradient is missing; NumericalError
        after three failed inversions in a row.
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
                P = axes.applied(stack, "inverse", stack["momentum"])
                harness.move(stack, blocks, P, ok)
            harness.plain_steps()
        harness.end()
        self._schedule()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, sampled ones too."""
        super().zero_grad(set_to_none)
        self._harness.capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start every H_i from its mean over batches, as the paper does, before step 1.

        closures: each runs the model on one batch (and, for likelihood="empirical", backward).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a parameter saw no batch.
        """
        harness = self._harness
        with torch.no_grad():
            axes.warm(harness, self._warm_gradients(closures))
            with harness.exact():
                self._refresh()

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave every H_i and its inverse as they are; no labels are sampled."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{parameter name: (U_1 + damping I)⁻¹ ⊗ (U_2 + damping I)⁻¹}, on vec M, live views.

        In general as many factors as axes, nested from the left; for one axis a plain tensor.

        Raises: RuntimeError before there is a state.
        """
        return axes.operators(self._harness, lambda s, b, i: s.of(b, f"inverse_{i + 1}")[0])

    def curvature(self) -> dict[str, Operator]:
        """{parameter name: U_1 ⊗ U_2}, undamped: the Fisher divided by the batch size; copies.

        Raises: RuntimeError before there is a state.
        """
        return axes.operators(self._harness, lambda s, b, i: covariance(s, i)[s.places[b]][0])

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()

    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with the state of the label generator under "labels"."""
        return {**super().state_dict(), **self._harness.extra_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, averages in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._schedule()

    def _schedule(self) -> None:
        """Sample labels on update steps only."""
        self._harness.schedule(add_gradient)

    def _learn(self, live: dict[Stack, list]) -> None:
        """Averages of an update step, and the inverses that are due."""
        harness = self._harness
        if harness.updating:
            for stack, G in self._gradients(live, UNSEEN).items():
                axes.learn(harness, stack, live[stack], G)
        harness.ready(live)
        if not harness.is_frozen:
            self._refresh()

    def _gradients(self, live: dict[Stack, list], missing: str) -> dict[Stack, Tensor]:
        """Mean gradients [size, *shape] of the sampled labels, or of the data's; no decay."""
        harness = self._harness
        if harness.labels is None:
            return {s: harness.gradient(s, blocks, decay=False) for s, blocks in live.items()}
        found = harness.collected(live, missing)
        return {
            stack: stack.gathered(
                {b: t.means["gradient"].reshape(1, *b.shape) for b, t in totals.items()}
            )
            for stack, totals in found.items()
        }

    def _warm_gradients(
        self, closures: Iterable[Callable[[], Any]]
    ) -> Iterator[tuple[int, dict[Stack, Tensor]]]:
        """The same for each closure, (1, 2, ...)."""
        harness = self._harness
        if harness.labels is None:
            yield from warm_gradients(harness, closures, decay=False)
            return
        everything = {stack: stack.blocks for stack in harness.stacks}
        for batch, _ in warming(harness, closures, add_gradient, eager=True):
            yield batch, self._gradients(everything, NOT_WARM)

    def _refresh(self) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        jobs = []
        for stack in self._harness.stacks:
            if stack.started:
                damping = stack.group["damping"]
                solver = CovarianceInverse(damping)
                for i, name in axes.names(stack, "H").items():
                    shifts = partial(solver.shift, stack, i)
                    result = f"inverse_{i + 1}"
                    jobs.append(Job(stack, name, result, solver, shifts, setting=damping))
        self._harness.refresh(jobs, all_until=self._harness.setting("refresh_every"))
