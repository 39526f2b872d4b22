"""Abstract parent of the optimizers that precondition gradients layer by layer."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks.blocks import Block
from ..capture.capture import Accumulate, Totals
from ..capture.closures import run
from ..capture.likelihoods import LIKELIHOODS
from ..linalg.operators import Operator
from . import momentum
from . import settings as checks
from .harness import Harness
from .inversions import Job
from .stacks import Stack
from .summary import table
from .warm_up import warming

NOT_SETTINGS = ("self", "__class__", "model", "groups")
REFRESHED = ("updates", "refreshes", "failed inverses", "not finite")

Live = dict[Stack, list[Block]]
Closure = Callable[[], Tensor]


class CurvatureOptimizer(Optimizer, ABC):
    """Preconditioned gradient descent, W_bar <- W_bar - lr P M for the W_bar = [W, b] of a layer.

    The training loop is the usual one: zero_grad, forward, backward of a mean over examples,
    step. Sampled labels are drawn inside the forward of `model` on update steps, from a generator
    seeded by torch.initial_seed(): call the model itself, not its parts. For micro-batches of m_i
    out of M examples scale each loss by m_i / M.

    model: dimension 0 of every layer's input is the batch; it returns a tensor.
    lr: step size, >= 0.  damping: > 0.
    momentum: of M, in [0, 1). M <- momentum M + (1 - momentum) (∇ + weight_decay W_bar), an
        average, or, where `heavy_ball`, M <- momentum M + ∇ + ...: lr is ten times smaller at 0.9.
    decay: of the running averages of statistics, in [0, 1).
    weight_decay: L2, for biases too; with decoupled_weight_decay=True W_bar shrinks by
        lr * weight_decay instead.
    likelihood: "categorical" (classes in dimension 1), "bernoulli" (logits), "gaussian" (unit
        variance, for ½ ‖output - label‖²): labels are sampled from the model, for a loss summed
        over outputs and positions and averaged over examples. "empirical": the data's labels.
    update_every: steps between updates of the statistics.
    refresh_every: steps between inversions; every step up to that number refreshes too.
    stagger: share a period's inversions out over its steps, so that none is much slower.
    groups: torch's parameter groups, for other lr, damping, momentum, decay, weight_decay.

    Parameters outside the layers take lr M; `summary()` says which are which.

    State of each weight: momentum [out, in+1], "counts" in the order of `counts`, failures in a
    row of each inversion, and the tensors that the class names; float32, or float64 for float64
    parameters, with an axis of groups first in a grouped convolution. param_groups[0]["step"]
    counts the steps.

    Raises: ValueError for a bad setting or a layer used in an unsupported way, naming it;
    NumericalError if an inversion fails three times in a row; RuntimeError from preconditioner()
    and curvature() before there is a state.

    Public methods are final. A subclass owes `_learn`, `_warm_up`, `_direction` and `_operator`.
    """

    __reduce_ex__ = checks.no_copy
    _step_supports_amp_scaling = True  # GradScaler leaves its scale to `Harness.begin`

    counts: ClassVar[tuple[str, ...]] = REFRESHED
    heavy_ball: ClassVar[bool] = False
    # settings of earlier versions: the value that changes nothing, and what takes its place
    _former: ClassVar[dict[str, tuple[Any, str]]] = {}

    def __new__(cls, *_args: Any, **settings: Any) -> Self:
        """Refuse settings of earlier versions. Raises: TypeError with what to use instead."""
        for name in settings.keys() & cls._former.keys():
            raise TypeError(f"{cls.__name__} takes no {name}=; {cls._former[name][1]}")
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]] | None,
        arguments: dict[str, Any],
        variables: Callable[[nn.Module], list[Any]] | None = None,
    ) -> None:
        # arguments: the subclass's locals(); variables: finds parameters in place of layers
        settings = {k: v for k, v in arguments.items() if k not in NOT_SETTINGS}
        checks.common(settings)
        checks.periods(settings)
        if "likelihood" in settings:
            checks.choice("likelihood", settings["likelihood"], [*LIKELIHOODS, "empirical"])
        self._check(settings)
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        form = momentum.heavy_ball if self.heavy_ball else momentum.average
        self._harness = Harness(self, model, self.counts, form, variables)
        if "likelihood" in settings:
            self._harness.sample(settings["likelihood"])
        self._prepare()
        self._schedule()

    @final
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Tensor | None:  # type: ignore[override]
        """One iteration; returns the loss of the closure, if there is one, before the step.

        Raises: ValueError naming a layer whose statistics are missing or do not fit;
        NumericalError after three failed inversions in a row. Methods that evaluate the loss
        twice: TypeError without a closure, ValueError under a GradScaler.
        """
        return self._iterate(closure)

    @final
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients and the statistics gathered with them."""
        super().zero_grad(set_to_none)
        self._harness.capture.clear()

    @final
    @torch.no_grad()
    def warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Start the running averages from their means over batches, before step 1.

        closures: each runs the model on one batch and, where statistics are made of the data's
        labels or of gradients, backward. Parameters, .grad and buffers end as they were.

        Raises: RuntimeError after the first step; ValueError if a layer saw no batch.
        """
        self._harness.scale = 1.0
        self._warm_up(closures)

    @final
    def frozen(self) -> AbstractContextManager[None]:
        """Inside, steps leave statistics and inverses as they are; no labels are sampled."""
        return self._harness.frozen(self._schedule)

    @final
    def preconditioner(self) -> dict[str, Operator]:
        """{name of the layer or parameter: P}, what the last step multiplied M by, live views.

        Raises: RuntimeError before there is a state.
        """
        return self._operators(self._operator)

    @final
    def summary(self) -> str:
        """A table: each parameter, how it is trained, the memory of its state, its counters."""
        return table(self, self._harness.model, self._harness.stack_of, self.counts)

    @final
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch; layers move to the group of their weight.

        Raises: ValueError for a bad setting or a stranger's parameter; nothing is added then.
        """
        super().add_param_group(param_group)
        if "_harness" in self.__dict__:  # torch's constructor adds the first ones
            self._harness.joined()
            try:
                self._regrouped()
            except ValueError:
                self.param_groups.pop()
                self._harness.regroup()
                raise

    @final
    def state_dict(self) -> dict[str, Any]:
        """As in PyTorch, with the state of the label generator as "labels" where there is one."""
        return {**super().state_dict(), **self._harness.extra_state(), **self._own_state()}

    @final
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, tensors in their own precision.

        Raises: ValueError for the state of another optimizer, or of a setting that is gone.
        """
        state_dict = {**state_dict, "param_groups": self._readable(state_dict["param_groups"])}
        super().load_state_dict(state_dict)
        self._harness.loaded(state_dict)
        self._regrouped()
        self._take_own_state(state_dict)
        self._schedule()

    # hooks that every method fills in

    @abstractmethod
    def _learn(self, live: Live) -> Any:
        """Update the statistics of these layers, and the inverses that are due, for `_move`."""

    @abstractmethod
    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        """Statistics from their means over batches."""

    @abstractmethod
    def _direction(self, stack: Stack) -> Tensor:
        """P M [size, out, in+1], M the stack's momentum."""

    @abstractmethod
    def _operator(self, stack: Stack, block: Block) -> Operator | None:
        """P of one block; None for the identity, which is not shown."""

    # hooks with a default

    def _check(self, settings: dict[str, Any]) -> None:
        """Raise ValueError for bad settings of the method's own."""

    def _prepare(self) -> None:
        """Make what the method holds beside the state."""

    def _accumulate(self) -> Accumulate | None:
        """What backward gathers on update steps; None for nothing."""
        return None

    def _inversions(self, stack: Stack) -> Iterable[Job]:  # noqa: ARG002
        """The inversions of a stack."""
        return ()

    @property
    def _all_until(self) -> int:
        """Up to this number every step that updates refreshes all inverses."""
        return self._harness.setting("refresh_every") + 1

    def _iterate(self, closure: Closure | None) -> Tensor | None:
        """One iteration, of one pass over the batch."""
        loss = None if closure is None else run(closure)
        if self._harness.begin():
            with self._harness.exact():
                live = self._harness.live()
                self._move(live, self._learn(live))
            self._end()
        return loss

    def _move(self, live: Live, learned: Any) -> None:  # noqa: ARG002
        """Momentum and step of all parameters; learned: what `_learn` returned."""
        for stack, blocks in live.items():
            ok = self._harness.absorb(stack, blocks)
            self._harness.move(stack, blocks, self._direction(stack), ok)
        self._harness.plain_steps()

    def _regrouped(self) -> None:
        """Follow stacks made anew. Raises: ValueError if they cannot be used."""

    def _own_state(self) -> dict[str, Any]:
        """What state_dict holds beside torch's own and the label generator."""
        return {}

    def _take_own_state(self, state_dict: dict[str, Any]) -> None:
        """Take over what `_own_state` gave."""

    # for the hooks

    @final
    def _learn_by(self, live: Live, learn: Callable[[Stack, dict[Block, Totals]], Tensor]) -> None:
        """Update statistics by learn(stack, totals) -> which learned [size] bool; then invert."""
        harness = self._harness
        if harness.capture.accumulate is not None:
            for stack, totals in harness.collected(live).items():
                ok = learn(stack, totals)
                harness.start(stack, totals)
                harness.learned(stack, ok, totals)
        self._ready(live)

    @final
    def _average_by(
        self,
        closures: Iterable[Callable[[], Any]],
        accumulate: Accumulate,
        average: Callable[[Stack, dict[Block, Totals], int], None],
    ) -> None:
        """Warm up by average(stack, totals, batch = 1, 2, ...) over the batches; then invert."""
        harness = self._harness
        for batch, found in warming(harness, closures, accumulate, eager=not harness.delivers):
            with harness.exact():
                for stack, totals in found.items():
                    average(stack, totals, batch)
        for stack in harness.stacks:
            harness.start(stack, stack.blocks)
        self._refresh()

    @final
    def _ready(self, live: Live) -> None:
        """Refresh the inverses that are due. Raises: RuntimeError for a layer without a state."""
        self._harness.ready(live)
        if not self._harness.is_frozen:
            self._refresh()

    @final
    def _refresh(self) -> None:
        """New inverses where they are due; a failed one is counted and the last good one kept."""
        stacks = [stack for stack in self._harness.stacks if stack.started]
        if jobs := [job for stack in stacks for job in self._inversions(stack)]:
            with self._harness.exact():
                self._harness.refresh(jobs, all_until=self._all_until)

    @final
    def _operators(self, make: Callable[[Stack, Block], Operator | None]) -> dict[str, Operator]:
        """{name: make(stack, block)} of the blocks with a state, but for those that give None."""
        made = {block.name: make(stack, block) for stack, block in self._harness.started()}
        return {name: one for name, one in made.items() if one is not None}

    @final
    def _end(self) -> None:
        """Count the step, and capture for the next one if it updates."""
        self._harness.end()
        self._schedule()

    @final
    def _schedule(self) -> None:
        self._harness.schedule(self._accumulate())

    @final
    def _readable(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups without former settings. Raises: ValueError for one that meant something."""
        who, kept = type(self).__name__, []
        for group in groups:
            for name, (usual, instead) in self._former.items():
                if group.get(name, usual) != usual:
                    raise ValueError(f"the state is of {who}({name}={group[name]!r}); {instead}")
            if missing := sorted(self.defaults.keys() - group.keys()):
                raise ValueError(f"the state is of another optimizer than {who}: no {missing}")
            self._check(group)
            kept.append({k: v for k, v in group.items() if k not in self._former})
        return kept
