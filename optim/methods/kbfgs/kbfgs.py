"""K-BFGS and K-BFGS(L): inverse Hessian blocks H_g ⊗ H_a, both factors by BFGS.

Source: Goldfarb, Ren, Bahamou 2020, arXiv:2006.08877, and its published code; convolutions: Ren,
Bahamou, Goldfarb 2021, arXiv:2102.06737.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.closures import parameters_at_rest, random_state, replayed, run, untouched
from ...core import distributed
from ...core import settings as checks
from ...core.grad_scaler import refuse_scaler
from ...core.harness import Harness
from ...core.momentum import average
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.basics import finite, finite_moments, known_true, learn_, per
from ...linalg.operators import Kronecker, Operator, by_group
from . import statistics, step_limit
from .formulas import (
    SPLITS,
    Split,
    applied,
    held_h_g,
    input_action_,
    patch_action_,
    split_damping,
    start_h_a,
    start_h_g,
    update_h_g_,
)
from .restarts import Restarts

COUNTS = (
    "H_g accepted",
    "H_g skipped",
    "H_a accepted",
    "H_a skipped",
    "Powell fired",
    "second damping fired",
    "step shortened",
    "H_g restarted",
    "H_a restarted",
    "not finite",
)


class KBFGS(Optimizer):
    """Kronecker-factored BFGS: W_bar <- W_bar - lr H_g M H_a, per Linear and Conv2d.

    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball
    learning rates (m <- 0.9 m + ∇) differ by a factor of ten. Parameters outside such layers take
    lr M. `summary()` says which are which.

    Each step evaluates the closure twice on the same batch, at θ and at θ - lr P; dropout masks
    repeat, the model's buffers and .grad end as the first evaluation left them (those of modules
    outside of it get both evaluations). In the second evaluation parameters get no gradients
    (.grad is None). The closure must call zero_grad and backward, and return the mean over the
    batch of per-example losses; for micro-batches of m_i out of M examples scale each loss by
    m_i / M. Where its second call raises, the parameters have moved already.

    model: dimension 0 of every layer's input is the batch.
    lr: step size, >= 0.  damping: λ > 0; λ_A = mu_2 = √λ, but see damping_split.
    momentum, decay: of M, and of A and of the pair (s, y), in [0, 1).
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    history: None for dense H_g [out, out]; p for K-BFGS(L), the last p pairs.
    update_every: steps between updates of the factors; the others take one evaluation.
    pair_decay: of (s, y) alone; the paper takes 0 for full batches. None: decay.
    damping_split: of convolutions with T places; "equal" as above, "sqrtT" λ_A = √λ √T and
        mu_2 = √λ / √T.
    curvature_limit: None for the published algorithm. c > 0, ours: d = -lr P is met by the
        curvature κ = 2 (ℓ(θ + d) - ℓ(θ) - ∇·d) / ⟨M, -d⟩ times the planned one; d and M are
        multiplied by min(1, c / κ) after H_g has learned from all of d (`kbfgs.step_limit` says
        why). At steps that update, with the closure's loss as it returns it. Of those tried, 5 is
        the greatest with which no seed diverged (docs/stability.md). Decoupled weight decay comes
        after the second evaluation then. The attribute `curvature_ratio` is κ of the last step, a
        tensor; None of one that updated nothing. ∞ only measures it.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    A Linear layer's A = E[Σ ã ãᵀ] is a running average (over positions it sums); H_g learns from
    doubly damped pairs. A convolution forms no A: its H_a learns from the action of the
    minibatch's on its mean patch, its H_g from pairs with mu_2 s added to y always.

    State of each weight: A (Linear), H_a [in+1, in+1]; H_g [out, out], or S, Y [p, out] with R, YY
    [p, p]; averaged s, y [out]; momentum [out, in+1]; counts, in the order of `COUNTS`; broken,
    restarts [2] of H_g and H_a; after an axis of groups in grouped convolutions. Factors are
    float32, or float64 for float64 parameters. The number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
        RuntimeError where A + λ_A I of a layer that begins has no inverse, or its first step does
        not update.
    Source: arXiv:2006.08877, algorithm and defaults of its published code (MNIST autoencoder,
    loss summed over 784 pixels). Its first pass over the data is `warm_up`.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x = torch.randn(8, 3)
        >>> opt = KBFGS(model, lr=0.1)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = model(x).square().sum(1).mean()
        ...     loss.backward()
        ...     return loss
        >>> losses = [opt.step(closure).item() for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    __reduce_ex__ = checks.no_copy

    _step_supports_amp_scaling = True  # to see a GradScaler, and refuse it
    _first = staticmethod(statistics.first)  # what the two passes gather
    _second = staticmethod(statistics.second)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 0.3,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        history: int | None = None,
        update_every: int = 1,
        *,
        pair_decay: float | None = None,
        damping_split: str = "equal",
        curvature_limit: float | None = None,
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
            "history": history,
            "update_every": update_every,
            "pair_decay": pair_decay,
            "damping_split": damping_split,
            "curvature_limit": curvature_limit,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.choice("damping_split", damping_split, SPLITS)
        if history is not None:
            checks.at_least_one("history", history)
        if pair_decay is not None:
            checks.fraction("pair_decay", pair_decay)
        if curvature_limit is not None:
            checks.limit("curvature_limit", curvature_limit)
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, average)
        self._harness.capture.wants_outputs = True
        self._restarts = Restarts(self._harness)
        self.curvature_ratio: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One iteration; returns the loss before it.

        Raises: TypeError without a closure; ValueError naming a layer whose statistics are
        missing or do not fit, and under a GradScaler.
        """
        refuse_scaler(self)
        closure, harness = checks.needed(closure), self._harness
        self.curvature_ratio = None
        distributed.wrapped(harness.model, "KBFGS")
        start, update = random_state(harness.model), harness.updating
        with harness.capture.recording(self._first if update else None):
            loss = run(closure)
        with harness.exact():
            live = harness.live()
            first = harness.collected(live) if update else {}
            for stack, totals in first.items():
                self._learn_a(stack, totals)
            harness.ready(live)
            limit = harness.setting("curvature_limit") if first else None
            before = {} if limit is None else step_limit.remember(harness.groups)
            for stack, blocks in live.items():
                ok = harness.absorb(stack, blocks)
                P = applied(stack)
                harness.move(stack, blocks, P, ok)
            harness.plain_steps()
            decay = step_limit.undecayed_(before, harness.groups)
            taken = step_limit.taken(before, live, self.state) if before else None
        second, after = self._second_pass(closure, start, first) if first else ({}, loss)
        with harness.exact():
            for stack in first:
                self._learn_h(stack, first[stack], second[stack])
            self._restarts.send(first)
            if taken is not None:
                self._shorten(taken, loss, after, live)
            for p, own in decay.items():
                p.sub_(own)
        harness.end()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the statistics gathered with them."""
        super().zero_grad(set_to_none)
        self._harness.capture.clear()

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start A from the mean over batches of E[Σ ã ãᵀ], as the paper does, before step 1.

        closures: each runs the model on one batch (a forward is enough, under no_grad too).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        harness, A = self._harness, dict[Stack, Tensor]()
        with torch.no_grad():
            moment = statistics.moment
            for batch, found in warming(harness, closures, moment, eager=True):
                for stack, totals in found.items():
                    stack.see_positions(totals)
                    new = statistics.input_factors(stack, totals)
                    A[stack] = A[stack].lerp_(new, 1 / batch) if stack in A else new.clone()
            for stack in harness.stacks:
                self._start(stack, stack.blocks, A[stack])

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave A, H_a, H_g and the pair as they are, and need one pass only."""
        return self._harness.frozen()

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: H_g ⊗ H_a}, live views of what the next step applies.

        For history=p the left factor is a CompactInverse; `left @ torch.eye(out)` makes it dense.

        Raises: RuntimeError before there is a state.
        """
        maps = {}
        for stack, block in self._harness.started():
            H_g, place = held_h_g(stack), stack.places[block]
            members = range(place.start, place.stop)
            maps[block.name] = by_group([Kronecker(H_g[i], stack["H_a"][i]) for i in members])
        return maps

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; layers move to the group of their weight."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()
            self._restarts.moved()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, factors in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._restarts.moved()

    def _start(self, stack: Stack, blocks: Iterable[Block], A: Tensor) -> None:
        """H_g = I and H_a = (A + λ_A I)⁻¹, the only inverse taken, for blocks that begin now."""
        new = self._harness.start(stack, blocks)
        if new:
            start_h_g(stack, new, self._harness.setting("history"))
            start_h_a(stack, new, A, self._dampings(stack)[0])

    def _learn_a(self, stack: Stack, totals: dict[Block, Totals]) -> None:
        """A <- decay A + (1 - decay) A_k; layers seen for the first time begin.

        Skipped at step 0 after warm_up: that A is of the whole data set already.
        """
        weight = 1 - stack.group["decay"]
        new = [block for block in totals if block not in stack.started]
        stack.see_positions(totals)
        if new or not stack.convolutional:
            A = statistics.input_factors(stack, totals)
            ok = finite_moments(stack.mask(totals), A)
            if new:
                self._start(stack, new, A.nan_to_num(0.0, 0.0, 0.0).mul_(per(ok, A)).mul_(weight))
            old = [block for block in totals if block not in new]
            if old and not stack.convolutional and self._harness.step > 0:
                learn_(stack["A"], A, weight, ok & stack.mask(old))
        self._restarts.begin_anew(stack, totals, self._dampings(stack)[0])

    def _second_pass(
        self,
        closure: Callable[[], Tensor],
        start: Any,
        first: dict[Stack, dict[Block, Totals]],
    ) -> tuple[dict[Stack, dict[Block, Totals]], Tensor]:
        """Means and the loss at the new point, on the same batch with the same dropout masks."""
        harness = self._harness
        model = harness.model
        quiet = getattr(model, "no_sync", nullcontext)  # DistributedDataParallel's
        with untouched(model), replayed(model, start), parameters_at_rest(model), quiet():
            with harness.capture.recording(self._second, outputs_only=True):
                loss = _run_again(closure)
            second = harness.collected({stack: list(totals) for stack, totals in first.items()})
        for stack, totals in first.items():
            for block, total in totals.items():
                if second[stack][block].rows != total.rows:
                    raise ValueError(
                        f"the closure's two calls gave layer '{block.name}' {total.rows} and "
                        f"{second[stack][block].rows} rows: both must use the same batch, so "
                        "draw it outside the closure; torch.autograd.grad inside counts too"
                    )
        return second, loss

    def _learn_h(
        self, stack: Stack, first: dict[Block, Totals], second: dict[Block, Totals]
    ) -> None:
        """Average the pair, update H_g by it and H_a by its Hessian action, and count."""
        lambda_a, mu_2 = self._dampings(stack)
        z, g = statistics.point(stack, first)
        z_new, g_new = statistics.point(stack, second)
        s, y = z_new - z, g_new - g
        live = stack.mask(first)
        ok = finite(s) & finite(y) & live
        decay = stack.group["pair_decay"]
        weight = 1 - (stack.group["decay"] if decay is None else decay)
        learn_(stack["s"], s, weight, ok)
        learn_(stack["y"], y, weight, ok)
        # a bad pair left the averages alone; NaN as gradient norm makes the skip rule refuse it
        gradient = g if known_true(ok) else torch.where(ok[:, None], g, float("nan"))
        accepted, powell, shifted, bad_g = update_h_g_(stack, gradient, mu_2)
        x = stack.gathered({block: total.means["x"] for block, total in first.items()})
        act = patch_action_ if stack.convolutional else input_action_
        acted, bad_a = act(stack, x, lambda_a, first)
        seen = {"H_g": ok, "H_a": finite(x) & live}
        self._restarts.note(stack, {"H_g": bad_g, "H_a": bad_a}, seen)
        flags = {
            "H_g accepted": accepted,
            "H_g skipped": ~accepted & live,
            "H_a accepted": acted,
            "H_a skipped": ~acted & live,
            "Powell fired": powell & live,
            "second damping fired": shifted & live,
            "not finite": ~ok & live,
        }
        self._harness.count(stack, flags)

    def _shorten(
        self, taken: step_limit.Taken, loss: Tensor, after: Tensor, live: dict[Stack, list[Block]]
    ) -> None:
        kept = self._kept(taken, loss.detach(), after.detach())
        step_limit.shorten_(taken, kept)
        for stack, blocks in live.items():
            self._harness.count(stack, {"step shortened": (kept < 1) & stack.mask(blocks)})

    def _kept(self, taken: step_limit.Taken, loss: Tensor, after: Tensor) -> Tensor:
        """The share of the step that stays, from the loss at both of its ends."""
        self.curvature_ratio = step_limit.ratio(taken, loss, after)
        return step_limit.kept(self.curvature_ratio, self._harness.setting("curvature_limit"))

    def _dampings(self, stack: Stack) -> tuple[Split, Split]:
        """λ_A and mu_2: numbers, or [size, 1]."""
        split = self._harness.setting("damping_split") if stack.convolutional else "equal"
        T = stack.positions[:, None] if split == "sqrtT" else None
        return split_damping(stack.group["damping"], split, T)


def _run_again(closure: Callable[[], Tensor]) -> Tensor:
    try:
        return run(closure)
    except Exception as error:
        error.add_note(
            "This was the closure's second call in one step of KBFGS, in which parameters get no "
            "gradients: what the closure does with .grad must allow for None, and a penalty of "
            "parameters alone is to be added to the loss before backward (or use weight_decay)."
        )
        raise
