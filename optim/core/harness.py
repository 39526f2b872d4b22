"""Shared optimizer machinery: layer batching, statistics, momentum, AMP, checkpoints."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks.blocks import Block, find_blocks, live_blocks
from ..capture.capture import UNSEEN, Accumulate, Capture, Totals
from ..capture.closures import full_precision
from ..capture.likelihoods import fits, sampled_score
from ..capture.loss_check import LossWatch
from ..capture.sampled_gradients import SampledGradients
from ..linalg.basics import factor_dtype, free_to_read, known_true
from . import distributed, momentum, settings
from .checkpoint import exact_state
from .grad_scaler import take_scale
from .inversions import Job, offsets
from .momentum import Form, plain_step_
from .refresher import Refresher
from .stacks import Stack, make_stacks


class Harness:
    """Layers, statistics and momentum of one optimizer.

    counts: names of the entries of each block's state["counts"]; "not finite" must be among them,
    and "failed inverses" for methods that refresh. form: of the momentum. variables: finds single
    parameters to take the place of layers.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        counts: tuple[str, ...],
        form: Form,
        variables: Callable[[nn.Module], list[Any]] | None = None,
    ) -> None:
        self.optimizer, self.model, self.counts, self.form = optimizer, model, counts, form
        self.find: Callable[[nn.Module], list[Any]] = variables or find_blocks
        self.blocks: list[Any] = self.find(model)
        capturing: Any = Capture if variables is None else SampledGradients
        self.capture: Any = capturing(model, self.blocks)
        self.is_frozen = False
        self.scale = 1.0
        self.delivers = False  # whether statistics are made of gradients as backward delivers them
        self.labels: torch.Generator | None = None
        self.wired = ""  # the likelihood whose labels are sampled
        self.refresher = Refresher(
            counts.index("failed inverses") if "failed inverses" in counts else 0,
            "raise the damping, lower lr, or look for inputs that are not finite or very large",
        )
        # a verdict on its way may ask for a second try, which a state read before would lack
        optimizer.register_state_dict_pre_hook(lambda _: self.refresher.settle(wait=True))
        self.regroup()

    def regroup(self) -> None:
        """Sort blocks into stacks, by the parameter groups as they are now."""
        groups = self.optimizer.param_groups
        self.groups = {p: group for group in groups for p in group["params"]}
        mine = [block for block in self.blocks if block.weight in self.groups]
        self.stacks = make_stacks(mine, groups, self.optimizer.state)
        self.stack_of = {block: stack for stack in self.stacks for block in stack.blocks}
        self._offsets: dict[tuple[int, ...], list[int]] = {}
        for stack in self.stacks:
            stack.adopt()

    @property
    def first(self) -> Tensor:
        """The first parameter that is trained."""
        return next(p for group in self.optimizer.param_groups for p in group["params"])

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return self.optimizer.param_groups[0]["step"]

    @property
    def updating(self) -> bool:
        """Whether statistics are updated at the coming step."""
        return self.step % self.setting("update_every") == 0 and not self.is_frozen

    @property
    def sum_scale(self) -> float | None:
        """What delivered gradients of examples are multiplied with; None for sampled ones."""
        return self.scale if self.delivers else None

    def setting(self, name: str) -> Any:
        """A setting that all groups share: the first group's."""
        return self.optimizer.param_groups[0][name]

    def sample(self, likelihood: str) -> None:
        """Sample labels from a generator of the optimizer's own, unless they are the data's."""
        self.wired = likelihood
        self.delivers = likelihood == "empirical" and isinstance(self.capture, Capture)
        self.labels = self.capture.sample = None
        if likelihood != "empirical":
            seed = torch.initial_seed() + distributed.rank()
            self.labels = torch.Generator(self.first.device).manual_seed(seed)
            self.capture.sample = self.score
            self.loss_watch = LossWatch(self.model, lambda: (self.step, self.setting("likelihood")))

    def schedule(self, accumulate: Accumulate | None) -> None:
        """Capture for the coming step, if it is one that updates; None captures nothing."""
        self.capture.accumulate = accumulate if self.updating else None

    def joined(self) -> None:
        """Check a parameter group just added, find its layers, give it the step number."""
        self.refresher.settle(wait=True)  # its verdicts are on stacks that go now
        groups = self.optimizer.param_groups
        settings.joined(groups, self.optimizer.defaults, self.model)
        known = {block.weight for block in self.blocks}
        found = [block for block in self.find(self.model) if block.weight not in known]
        inside = {p for group in groups for p in group["params"]}
        for block in self.blocks + found:
            parts = [p in inside for p in block.parameters]
            if any(parts) and not all(parts):
                groups.pop()
                raise ValueError(
                    f"layer '{block.name}': only one of weight and bias is in a group; add both, "
                    "or freeze the other (requires_grad_(False)) before"
                )
        self.blocks += found
        self.capture.watch(found)
        self.regroup()

    def score(self, output: Tensor) -> Tensor:
        """Score of one sampled label per example."""
        assert self.labels is not None
        fits(self.setting("likelihood"), output)
        return sampled_score(self.setting("likelihood"), output, self.labels)

    def begin(self) -> bool:
        """Undo a GradScaler's scale; False: skip the step. Raises: as `settle` and `take_scale`."""
        self.refresher.settle()
        scale = take_scale(self.optimizer, needed=self.delivers)
        if scale is None:
            self.capture.clear()
            return False
        self.scale = scale
        return True

    def end(self) -> None:
        """Count the step, and forget the statistics that it has used."""
        self.capture.clear()  # gradients zeroed in place would not tell that they are gone
        for group in self.optimizer.param_groups:
            group["step"] += 1

    def exact(self) -> AbstractContextManager[None]:
        """Arithmetic without autocast and TF32."""
        return full_precision(self.stacks[0].device if self.stacks else torch.device("cpu"))

    def live(self) -> dict[Stack, list[Block]]:
        """The blocks that have a gradient now, by stack."""
        found: dict[Stack, list[Block]] = {}
        self._heed_moves()
        for block in live_blocks(b for b in self.blocks if b in self.stack_of):
            found.setdefault(self.stack_of[block], []).append(block)
        return found

    def _heed_moves(self) -> None:
        """Follow a model to another dtype or device. Raises: ValueError if there is a state."""
        for block, stack in self.stack_of.items():
            W = block.weight
            if factor_dtype(W) == stack.dtype and W.device == stack.device:
                continue
            if self.optimizer.state:
                raise ValueError(
                    f"'{block.name}' is {W.dtype} on {W.device} now, its state is {stack.dtype} on "
                    f"{stack.device}; build the optimizer anew on the model as it is, and give it "
                    "this one's state_dict()"
                )
            self.regroup()
            if self.labels is not None and self.labels.device != self.first.device:
                self.sample(self.wired)
            return

    def collected(
        self, live: dict[Stack, list[Block]], missing: str = UNSEEN
    ) -> dict[Stack, dict[Block, Totals]]:
        """What capturing has gathered for these blocks, by stack."""
        blocks, own = [b for members in live.values() for b in members], self.capture.totals
        distributed.join_(self.stack_of, {b: own[b.name] for b in blocks if b.name in own})
        totals = self.capture.collect(blocks, missing)
        return {stack: {b: totals[b] for b in members} for stack, members in live.items()}

    def start(self, stack: Stack, blocks: Iterable[Block]) -> list[Block]:
        """Blocks of the stack whose state begins now; their counters are made."""
        if "counts" not in stack:
            stack.hold(
                counts=stack.zeros(len(self.counts), dtype=torch.int64),
                momentum=stack.zeros(*stack.shape),
            )
        return stack.start(blocks)

    def count(self, stack: Stack, flags: dict[str, Tensor]) -> None:
        """Add flags [size] bool to the counters of these names."""
        for name, flag in flags.items():
            stack["counts"].select(1, self.counts.index(name)).add_(flag)

    def learned(self, stack: Stack, ok: Tensor, blocks: Iterable[Block]) -> None:
        """Count the updates of these blocks' statistics, and where they failed; ok [size] bool."""
        self.count(stack, {"updates": ok})
        if not known_true(ok):
            self.count(stack, {"not finite": ~ok & stack.mask(blocks)})

    def ready(self, live: dict[Stack, list[Block]]) -> None:
        """Raise RuntimeError naming a live block that has no state yet."""
        for stack, blocks in live.items():
            for block in blocks:
                if block not in stack.started:
                    raise RuntimeError(
                        f"layer '{block.name}' has no statistics yet: its first step must be one "
                        "that updates (step number divisible by update_every, not frozen)"
                    )

    def absorb(self, stack: Stack, live: list[Block], ok: Tensor | None = None) -> Tensor:
        """Momentum of the stack; whose gradient was finite, [size] bool.

        ok: the answer, if somebody has looked; where it says no for one, all are looked at again.
        """
        ok = momentum.absorb_(stack, live, self.groups, self.form, ok)
        if not known_true(ok):
            self.count(stack, {"not finite": ~ok & stack.mask(live)})
        return ok

    def gradient(self, stack: Stack, live: list[Block], *, decay: bool = True) -> Tensor:
        """∇ [size, out, in+1], zero for blocks that are not live."""
        return momentum.gradient(stack, live, self.groups, decay=decay)

    def move(self, stack: Stack, live: list[Block], P: Tensor, ok: Tensor) -> None:
        """W_bar <- W_bar - lr P; spoils P. Momentum that led to no finite P starts anew."""
        moved = momentum.move_(stack, live, P, ok, self.groups)
        if moved is ok:
            return
        lost = ok & ~moved & stack.mask(live)
        if not (free_to_read(lost) and not bool(lost.any())):
            self.count(stack, {"not finite": lost})
            M = stack["momentum"]
            M.masked_fill_(lost.reshape(-1, *[1] * (M.ndim - 1)), 0.0)

    def plain_steps(self) -> None:
        """The plain rule for every parameter that has a gradient and no block."""
        inside = {p for block in self.stack_of for p in block.parameters}
        for parameter, group in self.groups.items():
            if parameter not in inside and parameter.grad is not None:
                plain_step_(parameter, self.optimizer.state[parameter], group, self.form)

    def refresh(self, jobs: list[Job], *, all_until: int = 1) -> None:
        """Solve the jobs that come at this step and count the blocks they refresh."""
        due = self.due(jobs, all_until=all_until)
        self.refresher.solve(due)
        for stack in {job.stack for job in due}:
            blocks = {block for job in due if job.stack is stack for block in job.blocks}
            self.count(stack, {"refreshes": stack.mask(blocks)})

    def due(self, jobs: list[Job], *, all_until: int) -> list[Job]:
        """The jobs that come at this step: all in the first steps, then each once per period.

        In the first steps only those whose factor or damping may have changed; a block without a
        result is always due. With stagger=True a period's work is shared out by its cost.
        """
        every = self.setting("refresh_every")
        shared = self.setting("stagger")
        if shared:
            jobs = [part for job in jobs for part in job.shared_out()]
        key = tuple(job.n for job in jobs for _ in range(len(job.M)))
        if key not in self._offsets:
            costs = [job.cost for job in jobs]
            self._offsets[key] = offsets(costs, every) if shared else [0] * len(jobs)
        chosen = []
        for job, offset in zip(jobs, self._offsets[key], strict=True):
            early = self.step < all_until and (self.updating or job.damping_changed)
            due = early or (self.step - offset) % every == 0
            job.blocks = job.started if due else job.new
            if job.blocks:
                chosen.append(job)
        return chosen

    @contextmanager
    def frozen(self, schedule: Callable[[], None] | None = None) -> Iterator[None]:
        """Inside, `is_frozen` is true; `schedule` is called at both ends."""
        before, self.is_frozen = self.is_frozen, True
        if schedule is not None:
            schedule()
        try:
            yield
        finally:
            self.is_frozen = before
            if schedule is not None:
                schedule()

    def started(self) -> list[tuple[Stack, Block]]:
        """Every block with a state. Raises: RuntimeError before there is one."""
        found = [(s, b) for b, s in self.stack_of.items() if b in s.started]
        if not found:
            raise RuntimeError("no state yet: take a step or call warm_up first")
        return found

    def extra_state(self) -> dict[str, Any]:
        """What state_dict holds beside torch's own: the label generator."""
        return {} if self.labels is None else {"labels": self.labels.get_state()}

    def loaded(self, state_dict: dict[str, Any]) -> None:
        """Take over a state_dict that torch has loaded, bit for bit."""
        exact_state(self.optimizer, state_dict)
        if self.wired and self.wired != self.setting("likelihood"):
            self.sample(self.setting("likelihood"))
        if self.labels is not None and "labels" in state_dict:
            self._take_labels(self.labels, state_dict["labels"].cpu())
        self.refresher.pending.clear()
        self.regroup()
        self.capture.clear()

    def _take_labels(self, labels: torch.Generator, state: Tensor) -> None:
        if len(state) == len(labels.get_state()):
            labels.set_state(state)
        else:
            warnings.warn(
                "the state's label generator is one of another kind of device than "
                f"{labels.device}; labels are drawn from the seed of this process instead",
                stacklevel=5,
            )
