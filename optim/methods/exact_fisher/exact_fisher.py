"""ExactFisher: the Fisher block of each layer, exact for its batch, inverted among its examples.

Source: the per-layer natural gradient by Sherman-Morrison-Woodbury of TENGraD, Soori et al. 2022,
arXiv:2106.03947; the block itself is the "Fisher-BD" of the published code of arXiv:2106.02925.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.closures import run
from ...capture.likelihoods import LIKELIHOODS
from ...capture.per_example import examples_of
from ...core import settings as checks
from ...core.harness import Harness
from ...core.momentum import average
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.operators import ExampleSum, Operator, Woodbury
from .rows import example_rows, factorization, make_room, room, woodbury

COUNTS = ("updates", "failed inverses", "not finite")


class ExactFisher(Optimizer):
    """Exact Fisher blocks of Linear and Conv2d layers: W_bar <- W_bar - lr (F + damping I)⁻¹ M.

    F = (1/m) Σ_n vec V_n (vec V_n)ᵀ with V_n = Σ_t g_nt x̃_ntᵀ the gradient of example n of the last
    batch, summed over positions (and calls) that share the weights; a grouped convolution is one
    block. No approximation but that of one batch and of blocks by layer: the reference others are
    held against. By Woodbury's identity only matrices of the size of the batch are factored:

        (F + damping I)⁻¹ M = (M - Σ_n ζ_n V_n / √m) / damping,
        (K + damping I) ζ = t,  K_nk = ⟨V_n, V_k⟩ / m,  t_n = ⟨V_n, M⟩ / √m.

    There is no running average of F, hence no decay. Between updates the batch of the last one
    serves on, with the damping of then.
    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball learning
    rates (m <- 0.9 m + ∇) differ by a factor of ten. Parameters outside such layers take lr M;
    `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. Labels are
    sampled inside the forward of `model` on update steps, from a generator of the optimizer's
    own (seeded from torch.initial_seed()), so the model is called itself, not its parts. For
    micro-batches of m_i out of M examples scale each loss by m_i / M.

    model: dimension 0 of every layer's input is the batch; it returns a tensor.
    lr: step size, >= 0.  damping: λ > 0 of F + λ I. In float32 directions of the batch are
        resolved to about 1e-7 of the largest eigenvalue of F: damping much below that fails.
    momentum: of M, in [0, 1).
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²), or "empirical": the gradients of the data's labels.
        Sampled ones are of a loss summed over outputs and positions and averaged over examples.
    update_every: steps between batches whose rows are taken.
    groups: as torch's parameter groups, for other lr, damping, momentum, weight_decay.

    State of each weight: g [m, T, out] (divided by √m), x [m, T, in+1], the rows of the last
    update: memory of m T (out + in + 1) floats a layer, T at most min(out, in+1), since more
    positions are summed into V_n; L [m, m], of K + damping I; the damping in it; momentum
    [out, in+1]; counts, in the order of `COUNTS`; failures in a row; after an axis of groups in
    grouped convolutions. m is that of the largest batch so far, smaller ones end in zero rows.
    Rows are float32, or float64 for float64 parameters. The number of steps is
    param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    NumericalError if K + damping I cannot be factored three times in a row.
    Source: arXiv:2106.03947; defaults lr and damping as for the MNIST autoencoder in its published
    code (batch 100, loss summed over 784 pixels).

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = ExactFisher(model, lr=0.3, damping=0.1, likelihood="gaussian")
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
        damping: float = 3.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        *,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        settings = {
            "lr": lr,
            "damping": damping,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
            "likelihood": likelihood,
            "update_every": update_every,
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
        NumericalError after three failed factorizations in a row.
        """
        harness = self._harness
        loss = None if closure is None else run(closure)
        if not harness.begin():
            return loss
        with harness.exact():
            live = harness.live()
            if harness.capture.accumulate is not None:
                self._learn(harness.collected(live))
            harness.ready(live)
            for stack, blocks in live.items():
                ok = harness.absorb(stack, blocks)
                harness.move(stack, blocks, woodbury(stack, stack["momentum"]), ok)
            harness.plain_steps()
        harness.end()
        self._schedule()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the rows gathered with them."""
        super().zero_grad(set_to_none)
        self._harness.capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Take the rows of the last batch, so that there is a state before step 1.

        Without running averages a pass over the data would add nothing: only the last of the
        closures is run, and the first step replaces what it leaves.

        closures: each runs the model on one batch (and, for likelihood="empirical", backward).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        likelihood = self._harness.setting("likelihood")
        last, eager = deque(closures, maxlen=1), likelihood != "empirical"
        with torch.no_grad():
            for _, found in warming(self._harness, last, examples_of(likelihood), eager=eager):
                with self._harness.exact():
                    self._learn(found)

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave the rows and L as they are; no labels are sampled."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: (F + damping I)⁻¹} as the last step applied it, live until a batch grows.

        Raises: RuntimeError before there is a state.
        """
        maps: dict[str, Operator] = {}
        for stack, block in self._harness.started():
            L, damping = stack.of(block, "L")[0], stack.of(block, "damping")[0]
            maps[block.name] = Woodbury(_fisher(stack, block), L, damping)
        return maps

    def curvature(self) -> dict[str, Operator]:
        """{module name: F}, the undamped Fisher blocks of the batch of the last update.

        Raises: RuntimeError before there is a state.
        """
        return {block.name: _fisher(stack, block) for stack, block in self._harness.started()}

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
        """Resume from `state_dict()` bit for bit, rows in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._schedule()

    def _schedule(self) -> None:
        """Capture on update steps only."""
        self._harness.schedule(examples_of(self._harness.setting("likelihood")))

    def _learn(self, found: dict[Stack, dict[Block, Totals]]) -> None:
        """Rows of this batch and their L; where that fails the last good ones stay."""
        harness, jobs = self._harness, []
        scale = harness.scale if harness.delivers else None
        for stack, totals in found.items():
            harness.start(stack, totals)
            rows = {b: example_rows(b, t, scale) for b, t in totals.items()}
            if (sizes := room(stack, rows)) != room(stack, {}):
                harness.refresher.settle(wait=True)  # failures of the shapes so far
                make_room(stack, *sizes)
            job, ok = factorization(stack, rows)
            mask = stack.mask(totals)
            harness.count(stack, {"updates": ok & mask, "not finite": ~ok & mask})
            jobs.append(job)
        harness.refresher.solve(jobs)


def _fisher(stack: Stack, block: Block) -> ExampleSum:
    return ExampleSum(stack.of(block, "g"), stack.of(block, "x"))
