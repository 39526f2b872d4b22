"""EKFAC: KFAC's eigenvectors with the Fisher block's own diagonal between them.

Source: George et al. 2018, arXiv:1806.03884.
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
from ...core import settings as checks
from ...core.harness import Harness
from ...core.inversions import Job
from ...core.kronecker_factors import factors_of, learn_factors, warm_factors
from ...core.momentum import average
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.operators import KroneckerEigen, Operator, by_group
from .formulas import (
    carry_columns_,
    carry_rows_,
    eigenvectors,
    factors_and_examples_of,
    learn_from_gradient,
    learn_scalings,
    scaled,
    values_between,
)

COUNTS = ("updates", "refreshes", "failed inverses", "not finite")
SCALINGS = ("examples", "gradient")
RA_DECAY = 0.75  # of EKFAC-ra's scalings


class EKFAC(Optimizer):
    """KFAC with corrected eigenvalues: W_bar <- W_bar - lr U_G[(U_Gᵀ M U_A)/(S + damping)]U_Aᵀ.

    U_A, U_G hold the eigenvectors of KFAC's A and G, refreshed at every step up to number
    `refresh_every` and then at each multiple of it. S, out x in+1, is a running average of
    E_n[(U_Gᵀ V_n U_A)²], V_n the gradient of one example, summed over its positions before it is
    squared: the best diagonal between these eigenvectors; or see scalings. A new basis takes S with
    it, as the diagonal of the same matrix.
    M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar) is an average: heavy-ball learning
    rates (m <- 0.9 m + ∇) differ by a factor of ten. Parameters outside Linear and Conv2d take
    lr M; `summary()` says which are which.

    The usual loop: zero_grad, forward, backward of a mean over examples, step. Labels are
    sampled inside the forward of `model` on update steps, from a generator of the optimizer's
    own (seeded from torch.initial_seed()), so the model is called itself, not its parts. For
    micro-batches of m_i out of M examples scale each loss by m_i / M. On update steps layer
    inputs and their gradients, of all micro-batches, are kept until the step (scalings="examples").

    model: dimension 0 of every layer's input is the batch; it returns a tensor.
    lr: step size, >= 0.  damping: λ > 0, added to each eigenvalue; a change acts at once.
    momentum, decay: of M, and of A, G and S, in [0, 1).
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²), or "empirical": the gradients of the data's labels.
        Sampled ones are of a loss summed over outputs and positions and averaged over examples.
    update_every, refresh_every: steps between updates of A, G and S, and between new eigenvectors.
    scalings: "examples" as above; "gradient": S averages m (U_Gᵀ ∇ U_A)², ∇ the mini-batch
        gradient of m examples by the data's labels, without weight decay: the paper's EKFAC-ra,
        cheaper, and noisier.
    scalings_decay: of S, in [0, 1). None: decay for "examples", the paper's 0.75 for "gradient".
    stagger: share a period's eigenvectors out over its steps, so that none is much slower.
    groups: as torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    State of each weight: A, U_A [in+1, in+1]; G, U_G [out, out]; S, momentum [out, in+1]; counts,
    in the order of `COUNTS`; failures in a row; after an axis of groups in grouped convolutions.
    All are float32, or float64 for float64 parameters. The number of steps is
    param_groups[0]["step"].

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    NumericalError if the eigenvectors of a factor are not found three times in a row.
    Source: arXiv:1806.03884, section 3, with the scalings as running averages; convolutions as in
    arXiv:1602.01407. Carrying S over is ours; so are lr and damping, which are KFAC's.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = EKFAC(model, lr=0.3, damping=0.1, likelihood="gaussian")
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
        scalings: str = "examples",
        scalings_decay: float | None = None,
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
            "scalings": scalings,
            "scalings_decay": scalings_decay,
            "stagger": stagger,
        }
        checks.common(settings)
        checks.periods(settings)
        checks.choice("scalings", scalings, SCALINGS)
        if scalings_decay is not None:
            checks.fraction("scalings_decay", scalings_decay)
        checks.choice("likelihood", likelihood, [*LIKELIHOODS, "empirical"])
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        self._harness = Harness(self, model, COUNTS, average)
        self._harness.sample(likelihood)
        self._schedule()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; with a closure, runs it first and returns its loss.

        Raises: ValueError naming a layer whose statistics are missing or do not fit;
        NumericalError after three failures in a row to find eigenvectors.
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
                P = scaled(stack["momentum"], stack["U_G"], stack["U_A"], _inverse_values(stack))
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
        """Start A and G from their means over batches, before step 1, and S from KFAC's values.

        These are the products of eigenvalues of G and A: single examples in the basis that all
        batches give would take a second pass.

        closures: each runs the model on one batch (and, for likelihood="empirical", backward).
        Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        harness = self._harness
        likelihood = harness.setting("likelihood")
        accumulate, eager = factors_of(likelihood), not harness.delivers
        with torch.no_grad():
            for batch, found in warming(harness, closures, accumulate, eager=eager):
                with harness.exact():
                    for stack, totals in found.items():
                        warm_factors(stack, totals, batch)
            for stack in harness.stacks:
                harness.start(stack, stack.blocks)
                stack.hold(S=stack.zeros(*stack.shape))
            with harness.exact():
                self._refresh()
                for stack in harness.stacks:
                    rows = values_between(stack["G"], stack["U_G"])
                    columns = values_between(stack["A"], stack["U_A"])
                    # rounding leaves eigenvalues of zero slightly negative
                    stack["S"].copy_((rows[:, :, None] * columns[:, None]).clamp_(min=0.0))

    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave A, G, S and the eigenvectors as they are; no labels are sampled."""
        return self._harness.frozen(self._schedule)

    def preconditioner(self) -> dict[str, Operator]:
        """{module name: U diag(1 / (S + damping)) Uᵀ}, U = U_G ⊗ U_A, with the damping of now.

        What the last step applied, unless the damping has been changed since.

        Raises: RuntimeError before there is a state.
        """
        return self._maps(_inverse_values)

    def curvature(self) -> dict[str, Operator]:
        """{module name: U diag(S) Uᵀ}, the undamped Fisher blocks, live views.

        Raises: RuntimeError before there is a state.
        """
        return self._maps(lambda stack: stack["S"])

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
        wanted = factors_of if self._from_gradient else factors_and_examples_of
        self._harness.schedule(wanted(self._harness.setting("likelihood")))

    @property
    def _from_gradient(self) -> bool:
        return self._harness.setting("scalings") == "gradient"

    def _scalings_decay(self, stack: Stack) -> float:
        own = self._harness.setting("scalings_decay")
        usual = RA_DECAY if self._from_gradient else stack.group["decay"]
        return usual if own is None else own

    def _learn(self, live: dict[Stack, list]) -> None:
        """A and G of an update step, the eigenvectors that are due, then S between them."""
        harness, learned = self._harness, []
        if harness.capture.accumulate is not None:
            for stack, totals in harness.collected(live).items():
                ok = learn_factors(stack, totals, harness.scale)
                if "S" not in stack:
                    stack.hold(S=stack.zeros(*stack.shape))
                harness.start(stack, totals)
                learned.append((stack, totals, ok))
        harness.ready(live)
        if not harness.is_frozen:
            self._refresh()
        scale = harness.scale if harness.delivers else None
        for stack, totals, ok in learned:
            decay = self._scalings_decay(stack)
            if self._from_gradient:
                G = harness.gradient(stack, list(totals), decay=False)
                ok = learn_from_gradient(stack, totals, G, decay, ok)
            else:
                ok = learn_scalings(stack, totals, scale, decay, ok)
            harness.learned(stack, ok, totals)

    def _refresh(self) -> None:
        """New eigenvectors where they are due; where none are found the last good ones stay."""
        harness, jobs = self._harness, []
        for stack in harness.stacks:
            if stack.started:
                S = stack["S"]
                columns, rows = partial(carry_columns_, S), partial(carry_rows_, S)
                jobs.append(Job(stack, "A", "U_A", eigenvectors, 0.0, replacing=columns))
                jobs.append(Job(stack, "G", "U_G", eigenvectors, 0.0, replacing=rows))
        harness.refresh(jobs, all_until=harness.setting("refresh_every") + 1)

    def _maps(self, values: Callable[[Stack], Tensor]) -> dict[str, Operator]:
        maps: dict[str, Operator] = {}
        for stack, block in self._harness.started():
            place = stack.places[block]
            U_G, U_A, own = stack["U_G"][place], stack["U_A"][place], values(stack)[place]
            maps[block.name] = by_group(
                [KroneckerEigen(*parts) for parts in zip(U_G, U_A, own, strict=True)]
            )
        return maps


def _inverse_values(stack: Stack) -> Tensor:
    """1 / (S + damping), [size, out, in+1]."""
    return (stack["S"] + stack.group["damping"]).reciprocal_()
