"""KFAC: Fisher blocks G ⊗ A, inverted factor by factor.

Source: Martens, Grosse 2015, arXiv:1503.05671, in the form that the published code of
arXiv:2006.08877 compares with; convolutions as in Grosse, Martens 2016, arXiv:1602.01407.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim import checks
from optim.factors import factors_of, learn_factors, warm_factors
from optim.harness import Harness
from optim.likelihoods import LIKELIHOODS
from optim.linalg import damped_inverse
from optim.momentum import average
from optim.operators import Kronecker, Operator, by_group
from optim.passes import run
from optim.refresh import Job
from optim.stacks import Stack

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
    update_every, refresh_every: steps between updates of A and G, and between inversions.
    pi: balance the damping by the factors' traces.
    stagger: share a period's inversions out over its steps, so that none is much slower.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each weight: A, A_inv [in+1, in+1]; G, G_inv [out, out]; momentum [out, in+1]; counts,
    in the order of `COUNTS`; failures in a row; after an axis of groups in grouped convolutions.
    Factors are float32, or float64 for float64 parameters. The number of steps is
    param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    RuntimeError if a factor cannot be inverted three times in a row.
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
        pi: bool = False,
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
            "pi": pi,
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
        RuntimeError after three failed inversions in a row.
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
                P = stack["G_inv"] @ stack["momentum"] @ stack["A_inv"]
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
            for batch, found in harness.warming(closures, accumulate, eager=eager):
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
        """As in PyTorch, with the state of the label generator under "labels"."""
        return {**super().state_dict(), **self._harness.extra_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, factors in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
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
                harness.count(stack, {"updates": ok, "not finite": ~ok & stack.mask(totals)})
        harness.ready(live)
        if not harness.is_frozen:
            self._refresh()

    def _refresh(self) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        harness, jobs = self._harness, []
        for stack in harness.stacks:
            if stack.started:
                pi: float | Tensor = 1.0
                if harness.setting("pi"):
                    pi = trace_balance(stack["A"], stack["G"])
                root = stack.group["damping"] ** 0.5
                jobs.append(Job(stack, "A", "A_inv", damped_inverse, root * pi))
                jobs.append(Job(stack, "G", "G_inv", damped_inverse, root / pi))
        harness.refresh(jobs, all_until=harness.setting("refresh_every") + 1)

    def _products(self, left: str, right: str) -> dict[str, Operator]:
        maps = {}
        for stack, block in self._harness.started():
            pairs = zip(stack.of(block, left), stack.of(block, right), strict=True)
            maps[block.name] = by_group([Kronecker(G, A) for G, A in pairs])
        return maps
