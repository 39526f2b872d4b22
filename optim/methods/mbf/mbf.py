"""MBF: the empirical Fisher matrix cut into many small blocks along its diagonal.

Source: Bahamou, Goldfarb, Ren 2023, arXiv:2202.04124; where the paper leaves a choice open, both
answers are options.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.closures import run
from ...capture.per_example import empirical_examples
from ...core import settings as checks
from ...core.harness import Harness
from ...core.inversions import Job
from ...core.momentum import gradient_of, heavy_ball
from ...core.stacks import Stack
from ...core.warm_up import warm_gradients, warming
from ...linalg.basics import finite, free_to_read, known_true, learn_
from ...linalg.operators import Operator
from . import mini_blocks
from .mini_blocks import Cut, cuts_of

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")
ESTIMATORS = ("minibatch", "per_example")
GROUPS = ("output", "input")


class MBF(Optimizer):
    """Mini-block Fisher: w_s <- w_s - lr (M_s + damping I)⁻¹ m_s for every slice w_s of W_bar.

    Slices of a Linear are the rows of W_bar (fc_group="output") or its columns ("input"), with one
    M for all of a layer, the mean of theirs, unless fc_share=False. Those of a Conv2d are its
    kernels of kh * kw weights, each with an M of its own unless conv_share says otherwise, and
    single biases. M <- decay M +
    (1 - decay) M_k from zero or from `warm_up`, with one of two estimators:

    "minibatch": M_k = ĝ_s ĝ_sᵀ, ĝ the gradient of the mini-batch mean as it stands in .grad when
        step() begins (clipped, if it was), without weight decay; no hooks, no second pass.
    "per_example": M_k = E_n[v_ns v_nsᵀ], v_n the gradient of one example's loss, summed over
        positions that share weights: blocks of the empirical Fisher. The batch's layer inputs and
        gradients are kept until the step.

    In expectation the two differ by a factor near the batch size, and so do dampings that suit.
    Inverses are refreshed at steps 0, refresh_every, 2 refresh_every, ...

    m <- momentum m + ∇ is a heavy ball: learning rates are ten times smaller than for the averages
    of KFAC and K-BFGS. Parameters outside such layers take lr m (the paper gives BatchNorm's a
    diagonal rule of its own); `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. For micro-batches
    of m_i out of M examples scale each loss by m_i / M.

    model: for "per_example" dimension 0 of every layer's input is the batch.
    lr: step size, >= 0.  damping: λ > 0 of each mini-block.
    momentum, decay: of m, and of the mini-blocks, in [0, 1).
    weight_decay: biases too; decoupled, W_bar shrinks by lr * weight_decay; with
        decoupled_weight_decay=False an L2 term in the momentum's gradient.
    update_every, refresh_every: steps between updates of M, and between inversions; the paper's
        are not known to us, 1 and 20 (10 and 100 for CNNs) are TNT's.
    conv_share: which kernels have one M, the mean of theirs: "none"; "output", those of all outputs
        at one input channel; "all" of a layer (the paper's spatial averaging). Saves memory.
    stagger: share a period's inversions out over its steps, so that none is much slower.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each weight, with n the length of a slice: M, M_inv [n, n], or [slices, n, n] with
    fc_share=False; in a convolution M, M_inv [O, I, kh*kw, kh*kw], without O or both as they share,
    and M_bias, M_bias_inv [O, 1, 1]; momentum [out, in+1]; counts, in the order of `COUNTS`;
    failures in a row; after an axis of groups in grouped convolutions. float32, or float64 for
    float64 parameters. The number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting, unshared blocks over 4 GB, or a layer used in an
    unsupported way, naming it; NumericalError if a block cannot be inverted three times in a row.
    Source: arXiv:2202.04124, section 3. The defaults of lr and damping are ours, from small trials
    with "minibatch": on the MNIST autoencoder (loss summed over pixels, batches of 1000) lr=0.003
    diverged; on 8x8 digits it was better than 0.001. lr / damping is what matters most.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = MBF(model, lr=0.01, damping=0.1)
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
        lr: float = 1e-3,
        damping: float = 0.1,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        estimator: str = "minibatch",
        fc_group: str = "output",
        fc_share: bool = True,
        conv_share: str = "none",
        stagger: bool = False,
        decoupled_weight_decay: bool = True,
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
            "refresh_every": refresh_every,
            "estimator": estimator,
            "fc_group": fc_group,
            "fc_share": fc_share,
            "conv_share": conv_share,
            "stagger": stagger,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.choice("estimator", estimator, ESTIMATORS)
        checks.choice("fc_group", fc_group, GROUPS)
        checks.choice("conv_share", conv_share, mini_blocks.CONV_SHARES)
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, heavy_ball)
        self._check_room()
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
            learned = self._learn(live)
            for stack, blocks in live.items():
                # mini-blocks of the gradient itself were finite: so is the gradient
                ok = harness.absorb(stack, blocks, None if harness.delivers else learned.get(stack))
                if stack in learned and not known_true(learned[stack]):
                    # what absorb counted is not counted again
                    harness.count(stack, {"not finite": ~learned[stack] & ok})
                P = mini_blocks.applied(stack, self._cuts(stack))
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
        """Start M from its mean over batches, before step 1.

        closures: each runs the model on one batch and back-propagates its mean loss. Parameters,
        .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError for a layer without a gradient.
        """
        harness = self._harness
        with torch.no_grad():
            for batch, found in self._warming(closures):
                for stack, new in found.items():
                    harness.start(stack, stack.blocks)
                    ok = self._take(stack, new, 1 / batch, stack.blocks)
                    harness.count(stack, {"not finite": ~ok})
            with harness.exact():
                self._refresh()

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave M and its inverses as they are; nothing is captured."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: the inverses by which the last step multiplied}, live views.

        Shared rows I ⊗ M_inv, shared columns M_inv ⊗ I, rows and kernels block-diagonal.
        Raises: RuntimeError before there is a state.
        """
        return self._operators("_inv")

    def curvature(self) -> dict[str, Operator]:
        """{module name: the undamped mini-blocks at their places}, live views.

        Raises: RuntimeError before there is a state.
        """
        return self._operators("")

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; layers move to the group of their weight."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()
            try:
                self._check_room()
            except ValueError:
                self.param_groups.pop()
                self._harness.regroup()
                raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, mini-blocks in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._schedule()

    def _schedule(self) -> None:
        """Capture on update steps only, and only for examples one by one."""
        harness = self._harness
        harness.delivers = harness.setting("estimator") == "per_example"
        if harness.delivers:
            harness.schedule(empirical_examples)

    def _check_room(self) -> None:
        harness = self._harness
        if not harness.setting("fc_share"):
            mini_blocks.check_room(list(harness.stack_of), harness.setting("fc_group"))

    def _cuts(self, stack: Stack) -> list[Cut]:
        setting = self._harness.setting
        return cuts_of(stack, setting("fc_group"), setting("fc_share"), setting("conv_share"))

    def _learn(self, live: dict[Stack, list[Block]]) -> dict[Stack, Tensor]:
        """Statistics of an update step, and the inverses that are due; whose M learned."""
        harness, learned = self._harness, {}
        if harness.updating:
            found = harness.collected(live) if harness.delivers else {}
            for stack, blocks in live.items():
                learned[stack] = self._update(stack, blocks, found.get(stack, {}))
                harness.start(stack, blocks)
                harness.count(stack, {"updates": learned[stack]})
        harness.ready(live)
        if not harness.is_frozen:
            self._refresh()
        return learned

    def _update(self, stack: Stack, blocks: list[Block], totals: dict[Block, Totals]) -> Tensor:
        """M <- decay M + (1 - decay) M_k unless M_k is not finite; whose M learned, [size] bool."""
        harness, cuts, decay = self._harness, self._cuts(stack), stack.group["decay"]
        if self._is_one_product(stack, blocks, cuts[0]):
            for block in blocks:
                W, *b = [gradient_of(p).to(stack.dtype) for p in block.parameters]
                mini_blocks.learn_rows_(stack.of(block, "M")[0], W, b[0] if b else None, decay)
            return stack.mask(blocks)
        if harness.delivers:
            new = self._example_moments(stack, totals, harness.scale)
        else:
            G = harness.gradient(stack, blocks, decay=False)
            new = mini_blocks.minibatch_moments(stack, cuts, G)
        return self._take(stack, new, 1 - decay, blocks)

    def _take(
        self, stack: Stack, new: dict[str, Tensor], weight: float, blocks: list[Block]
    ) -> Tensor:
        """M <- (1 - weight) M + weight M_k where M_k is finite; whose M did, [size] bool."""
        ok = stack.mask(blocks)
        for name, M in new.items():
            if name not in stack:
                stack.hold(**{name: torch.zeros_like(M)})
            ok = ok & finite(M.diagonal(dim1=-2, dim2=-1))
        for name, M in new.items():
            learn_(stack[name], M, weight, ok)
        return ok

    def _is_one_product(self, stack: Stack, blocks: list[Block], cut: Cut) -> bool:
        """Whether M can take ∇ᵀ ∇ straight in: shared rows, all known to be finite."""
        plain = cut.over and cut.slices is mini_blocks.rows and not self._harness.delivers
        if not plain or len(blocks) < len(stack.blocks) or "M" not in stack:
            return False
        return free_to_read(stack["M"]) and mini_blocks.squares_finite(blocks, stack.dtype)

    def _example_moments(
        self, stack: Stack, totals: dict[Block, Totals], scale: float
    ) -> dict[str, Tensor]:
        cuts = self._cuts(stack)
        each = {b: mini_blocks.example_moments(b, t, cuts, scale) for b, t in totals.items()}
        return {cut.name: stack.gathered({b: each[b][cut.name] for b in each}) for cut in cuts}

    def _warming(
        self, closures: Iterable[Callable[[], Any]]
    ) -> Iterator[tuple[int, dict[Stack, dict[str, Tensor]]]]:
        """(1, 2, ...) with M_k of each closure's batch, by stack."""
        harness = self._harness
        if harness.delivers:
            for batch, kept in warming(harness, closures, empirical_examples, eager=False):
                with harness.exact():
                    found = {s: self._example_moments(s, t, 1.0) for s, t in kept.items()}
                yield batch, found
        else:
            for batch, gradients in warm_gradients(harness, closures, decay=False):
                with harness.exact():
                    found = {
                        s: mini_blocks.minibatch_moments(s, self._cuts(s), G)
                        for s, G in gradients.items()
                    }
                yield batch, found

    def _refresh(self) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        jobs = []
        for stack in self._harness.stacks:
            if stack.started:
                for name in (cut.name for cut in self._cuts(stack)):
                    damping = stack.group["damping"]
                    jobs.append(Job(stack, name, f"{name}_inv", mini_blocks.mini_inverse, damping))
        self._harness.refresh(jobs)

    def _operators(self, suffix: str) -> dict[str, Operator]:
        return {
            block.name: mini_blocks.operator(stack, block, self._cuts(stack), suffix)
            for stack, block in self._harness.started()
        }
