"""K-BFGS and K-BFGS(L): inverse Hessian blocks H_g ⊗ H_a, both factors by BFGS."""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.closures import parameters_at_rest, random_state, replayed, run, untouched
from ...core import distributed
from ...core import settings as checks
from ...core.base import Closure, CurvatureOptimizer, Live
from ...core.grad_scaler import refuse_scaler
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.basics import finite, finite_moments, known_true, learn_, per
from ...linalg.operators import Kronecker, Operator, by_group
from . import statistics
from .formulas import (
    applied,
    held_h_g,
    input_action_,
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


class KBFGS(CurvatureOptimizer):
    """Kronecker-factored BFGS: W_bar <- W_bar - lr H_g M H_a, per Linear and Conv2d.

    Each step evaluates the closure twice on the same batch, at θ and at θ - lr P; dropout masks
    repeat, the model's buffers and .grad end as the first evaluation left them (those of modules
    outside of it get both evaluations). In the second evaluation parameters get no gradients
    (.grad is None). The closure must call zero_grad and backward, and return the mean over the
    batch of per-example losses. Where its second call raises, the parameters have moved already.

    A Linear layer's A = E[Σ ã ãᵀ] is a running average (over positions it sums); H_g learns from
    doubly damped pairs. A convolution forms no A: its H_a learns from the action of the
    minibatch's on its mean patch, its H_g from pairs with mu_2 s added to y always. M is an
    average. `warm_up` starts A, as the paper does; a forward is enough there, under no_grad too.
    `KBFGSLimited` keeps from diverging where this does.

    damping: λ > 0; λ_A = mu_2 = √λ.
    decay: of A and of the pair (s, y).
    history: None for dense H_g [out, out]; p for K-BFGS(L), the last p pairs.
    update_every: steps between updates of the factors; the others take one evaluation.
    pair_decay: of (s, y) alone; the paper takes 0 for full batches. None: decay.

    State of each weight: A (Linear), H_a [in+1, in+1]; H_g [out, out], or S, Y [p, out] with R, YY
    [p, p]; averaged s, y [out]; broken, restarts [2] of H_g and H_a.
    Raises: RuntimeError where A + λ_A I of a layer that begins has no inverse, or its first step
    does not update.
    Source: Goldfarb, Ren, Bahamou 2020, arXiv:2006.08877, algorithm and defaults of its published
    code (MNIST autoencoder, loss summed over 784 pixels); convolutions: Ren, Bahamou, Goldfarb
    2021, arXiv:2102.06737.
    """

    counts = COUNTS
    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "curvature_limit": (None, "use KBFGSLimited(curvature_limit=...)"),
        "damping_split": ("equal", "the damping is split equally, λ_A = mu_2"),
    }
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
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals())

    def _check(self, settings: dict[str, Any]) -> None:
        if settings["history"] is not None:
            checks.at_least_one("history", settings["history"])
        if settings["pair_decay"] is not None:
            checks.fraction("pair_decay", settings["pair_decay"])

    def _prepare(self) -> None:
        self._harness.capture.wants_outputs = True
        self._restarts = Restarts(self._harness)

    def _regrouped(self) -> None:
        self._restarts.moved()

    def _iterate(self, closure: Closure | None) -> Tensor:
        refuse_scaler(self)
        closure, harness = checks.needed(closure, type(self).__name__), self._harness
        distributed.wrapped(harness.model, "KBFGS")
        start = random_state(harness.model)
        with harness.capture.recording(self._first if harness.updating else None):
            loss = run(closure)
        with harness.exact():
            live = harness.live()
            first = self._learn(live)
            self._move(live, first)
        second, after = self._second_pass(closure, start, first) if first else ({}, loss)
        with harness.exact():
            for stack in first:
                self._learn_h(stack, first[stack], second[stack])
            self._restarts.send(first)
            self._judge(live, loss, after)
        self._end()
        return loss

    def _learn(self, live: Live) -> dict[Stack, dict[Block, Totals]]:
        """A of an update step; what the first pass gathered, for the second."""
        first = self._harness.collected(live) if self._harness.updating else {}
        for stack, totals in first.items():
            self._learn_a(stack, totals)
        self._ready(live)
        return first

    def _judge(self, live: Live, loss: Tensor, after: Tensor) -> None:
        """Last act of a step, for variants: the layers that moved, the loss before and after."""

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        harness, A = self._harness, dict[Stack, Tensor]()
        for batch, found in warming(harness, closures, statistics.moment, eager=True):
            for stack, totals in found.items():
                new = statistics.input_factors(stack, totals)
                A[stack] = A[stack].lerp_(new, 1 / batch) if stack in A else new.clone()
        for stack in harness.stacks:
            self._start(stack, stack.blocks, A[stack])

    def _direction(self, stack: Stack) -> Tensor:
        return applied(stack)

    def _operator(self, stack: Stack, block: Block) -> Operator:
        """H_g ⊗ H_a of the next step; for history=p the left factor is a CompactInverse."""
        H_g, place = held_h_g(stack), stack.places[block]
        members = range(place.start, place.stop)
        return by_group([Kronecker(H_g[i], stack["H_a"][i]) for i in members])

    def _start(self, stack: Stack, blocks: Iterable[Block], A: Tensor) -> None:
        """H_g = I and H_a = (A + λ_A I)⁻¹, the only inverse taken, for blocks that begin now."""
        new = self._harness.start(stack, blocks)
        if new:
            start_h_g(stack, new, self._harness.setting("history"))
            start_h_a(stack, new, A, self._dampings(stack)[0])

    def _learn_a(self, stack: Stack, totals: dict[Block, Totals]) -> None:
        # not at step 0 after warm_up: that A is of the whole data set already
        weight = 1 - stack.group["decay"]
        new = [block for block in totals if block not in stack.started]
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
        acted, bad_a = input_action_(stack, x, lambda_a, first)
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

    def _dampings(self, stack: Stack) -> tuple[float, float]:
        """λ_A and mu_2, whose product is λ."""
        root = stack.group["damping"] ** 0.5
        return root, root


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
