"""Shampoo: every axis of a parameter preconditioned by a root of the gradient's contraction.

Source: Gupta, Koren, Singer 2018, arXiv:1802.09568, in the form that the published code of
arXiv:2106.02925 compares with.
"""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...capture.closures import run
from ...core import axes
from ...core import settings as checks
from ...core.distributed import Solver
from ...core.harness import Harness
from ...core.inversions import Job
from ...core.momentum import heavy_ball
from ...core.stacks import Stack
from ...core.warm_up import warm_gradients
from ...linalg.operators import Operator
from .roots import inverse_root, root

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")


@cache
def root_solver(p: int) -> Solver:
    """(M, damping) -> (M + damping I)^(-1/p); one object for each p, so that jobs go together."""
    return partial(inverse_root, p=p)


class Shampoo(Optimizer):
    """A root for each axis: W <- W - lr L_root M R_root, for every parameter by itself.

    L_root = (L + damping I)^(-1/4), R_root likewise; L and R are running averages of ∇ ∇ᵀ and
    ∇ᵀ ∇ of the mini-batch gradient ∇, unless sums=True. In general H_i on axis i of k axes has the
    exponent -1/(2k): a convolution's weight has three, (O, I/groups, kh*kw); biases, norms and
    whatever is no matrix have one, with the full n x n average of ∇ ∇ᵀ. Axes longer than `max_axis`
    (a large vocabulary) get no matrix and do not count in k; a parameter with such axes only
    takes lr M; `summary()` says which. Roots are refreshed at each multiple of `refresh_every`,
    the first step included. M <- momentum M + ∇ is heavy-ball: the averages of KFAC and its kin
    want learning rates ten times larger.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. For micro-batches
    of m_i out of M examples scale each loss by m_i / M.

    model: any; its layers do not matter.
    lr: step size, >= 0.  damping: ε > 0 added to each H_i.
    momentum, decay: of M, and of H_i, in [0, 1).
    weight_decay: W shrinks by lr * weight_decay; with decoupled_weight_decay=False
        weight_decay W is added to ∇ instead.
    update_every, refresh_every: steps between updates of H_i, and between roots.
    refresh_early: new roots at each update of H_i before step `refresh_every` too, as the published
        code has them for CNNs.
    stagger: share a period's roots out over its steps, so that none is much slower.
    max_axis: length of an axis, >= 1, beyond which it gets no matrix.
    sums: H_i <- H_i + ∇ ∇ᵀ, sums from zero, to which the root adds damping I, as in the original
        paper; decay is not used then, and there is nothing to warm up.
    join_bias: a Linear layer's bias is the last column of its weight, [out, in+1], one parameter.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each parameter: H_1, H_2, ... and root_1, root_2, ... [n_i, n_i]; momentum, of the
    parameter's entries; counts, in the order of `COUNTS`; failures in a row. Float32, or float64
    for float64 parameters. The number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting or a sparse gradient; NumericalError if a root fails three
    times in a row.
    Source: arXiv:1802.09568; averages, flattening and defaults as in the published code of
    arXiv:2106.02925 (MNIST autoencoder, loss summed over 784 pixels).

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = Shampoo(model, lr=0.03)
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
        lr: float = 3e-4,
        damping: float = 3e-4,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        refresh_early: bool = False,
        stagger: bool = False,
        decoupled_weight_decay: bool = True,
        max_axis: int = 8192,
        sums: bool = False,
        join_bias: bool = False,
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
            "refresh_early": refresh_early,
            "stagger": stagger,
            "max_axis": max_axis,
            "sums": sums,
            "join_bias": join_bias,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.at_least_one("max_axis", max_axis)
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        found = axes.variables(max_axis, join_bias=join_bias)
        self._harness = Harness(self, model, COUNTS, heavy_ball, found)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError for a sparse gradient; NumericalError after three failed roots in a row.
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
                P = axes.applied(stack, "root", stack["momentum"])
                harness.move(stack, blocks, P, ok)
            harness.plain_steps()
        harness.end()
        return loss

    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start every H_i from its mean over batches, as the papers do, before step 1.

        The first step then leaves H_i as it is. closures: each runs the model on one batch, and
        backward. Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError for a parameter without a gradient,
        and with sums=True.
        """
        harness = self._harness
        if harness.setting("sums"):
            raise ValueError("sums=True starts from zero: leave warm_up out, or take averages")
        with torch.no_grad():
            axes.warm(harness, warm_gradients(harness, closures, decay=True))
            with harness.exact():
                self._refresh()

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave every H_i and its root as they are."""
        return self._harness.frozen()

    def preconditioner(self) -> dict[str, Operator]:
        """{parameter name: L_root ⊗ R_root}, the map on the row-major momentum, live views.

        In general as many factors as axes, nested from the left; for one axis a plain tensor.

        Raises: RuntimeError before there is a state.
        """
        return axes.operators(self._harness, lambda s, b, i: s.of(b, f"root_{i + 1}")[0])

    def curvature(self) -> dict[str, Operator]:
        """{parameter name: L^(1/4) ⊗ R^(1/4)}, what the preconditioner inverts, undamped.

        A copy, made by eigenvalues at each call. Its square, not itself, bounds the second moment
        of the mini-batch gradient.

        Raises: RuntimeError before there is a state.
        """
        return axes.operators(
            self._harness, lambda s, b, i: root(s.of(b, f"H_{i + 1}"), _power(s))[0]
        )

    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return self._harness.summary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch."""
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:
            self._harness.joined()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, averages in their own precision."""
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)

    def _learn(self, live: dict[Stack, list]) -> None:
        """Averages of an update step, and the roots that are due."""
        harness = self._harness
        for stack, blocks in live.items():
            # what warm_up began rests once, its batches being about the same as this one
            if harness.updating and not (harness.step == 0 and stack.started):
                axes.learn(harness, stack, blocks, harness.gradient(stack, blocks))
        harness.ready(live)
        if not harness.is_frozen:
            self._refresh()

    def _refresh(self) -> None:
        """New roots where they are due; a failed one is counted and the last good one kept."""
        harness = self._harness
        jobs = [
            Job(stack, name, f"root_{i + 1}", root_solver(_power(stack)), stack.group["damping"])
            for stack in harness.stacks
            if stack.started
            for i, name in axes.names(stack, "H").items()
        ]
        early = harness.setting("refresh_every") if harness.setting("refresh_early") else 1
        harness.refresh(jobs, all_until=early)


def _power(stack: Stack) -> int:
    """Twice the number of axes with a matrix."""
    return 2 * len(axes.axes_of(stack))
