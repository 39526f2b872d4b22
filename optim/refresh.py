"""Inverses and roots of factors: when they are due, in batches of one size, and failures.

A result that fails is tried again in float64; if that fails too, the last good one stays, the
failure is counted, and training stops with the remedies after several in a row. On a GPU nobody
waits for the verdict: flags are copied to the host in the background, and the second try comes with
a later step. Several processes share the work out by its cost and tell each other the results.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optim import distributed
from optim.distributed import Solver
from optim.errors import NumericalError
from optim.layers import Block
from optim.linalg import free_to_read, known_true, per
from optim.stacks import Stack

PATIENCE = 3  # failures in a row before training is stopped
SOLVED_WITH = "solved_with"  # of a parameter group, and so of state_dict: the last damping used


@dataclass(eq=False)
class Job:
    """stack[result] <- solver(stack[factor], damping), for each matrix of a stack.

    solver(M [b, n, n], damping [b]) -> results and for which they are good, [b] bool. For results
    that are several tensors, one may give them side by side in one. A factor [size, ..., n, n] is
    many small matrices for each one of the stack, which are kept or refused together.

    matrix: the factor itself, if the stack does not hold one under that name. beside: by name,
    what a result was made with and goes with: stack[name] takes it where the result is kept.
    damping: may be a function that makes it, called for jobs that are due. setting: of the
        optimizer, what the damping was made from together with the factor; itself unless given.
    only: matrices of the stack to solve for, [size] bool; None is all of the blocks'.
    replacing: called with the results held and those about to take their place, so that what is
    expressed in them can follow.
    """

    stack: Stack
    factor: str
    result: str
    solver: Solver
    damping: float | Tensor | Callable[[], Tensor]
    blocks: list[Block] = field(default_factory=list)
    matrix: Tensor | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)
    only: Tensor | None = None
    setting: float | Tensor | None = None
    replacing: Callable[[Tensor, Tensor], None] | None = None

    @property
    def M(self) -> Tensor:
        """The factor."""
        return self.stack[self.factor] if self.matrix is None else self.matrix

    @property
    def live(self) -> Tensor:
        """Which matrices of the stack are to be solved for, [size] bool."""
        mask = self.stack.mask(self.blocks)
        return mask if self.only is None else mask & self.only

    @property
    def new(self) -> list[Block]:
        """Started blocks that have no result yet."""
        have = self.stack.solved.get(self.result, set())
        return [block for block in self.stack.started if block not in have]

    @property
    def damped_by(self) -> float | Tensor:
        """The setting behind the damping."""
        if self.setting is not None:
            return self.setting
        assert not callable(self.damping), "a function needs the setting behind it"
        return self.damping

    @property
    def damping_changed(self) -> bool:
        """Whether the setting may not be that of the last results; tensors are not looked at."""
        now = self.damped_by
        return isinstance(now, Tensor) or self.stack.group.get(SOLVED_WITH) != now

    @property
    def failures(self) -> Tensor:
        """How often in a row each matrix failed, [size]; part of the layers' state."""
        name = f"{self.factor}_failures"
        if name not in self.stack:
            self.stack.hold(**{name: self.stack.zeros(dtype=torch.int64)})
        return self.stack[name]

    @property
    def n(self) -> int:
        """Size of each matrix."""
        return self.M.shape[-1]

    @property
    def key(self) -> tuple:
        """Jobs with the same key are solved together."""
        M = self.M
        return self.solver, self.n, M.dtype, M.device

    @property
    def cost(self) -> float:
        """Arithmetic of a solution, up to a factor."""
        return float(self.M.numel() * self.n)

    def matrices(self) -> Tensor:
        """The factor as [b, n, n]."""
        return self.M.flatten(0, -3)

    def dampings(self) -> Tensor:
        """One damping for each of the matrices, [b]."""
        M, size = self.matrices(), self.stack.size
        damping = self.damping() if callable(self.damping) else self.damping
        if isinstance(damping, Tensor):
            own = damping.to(M.dtype).expand(size)
            return own.repeat_interleave(len(M) // size)
        return M.new_full((len(M),), damping)

    def shaped(self, result: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
        """A solver's results as the stack holds them, [size, ...], and which are good, [size]."""
        many = self.M.shape[:-2]
        return result.unflatten(0, many), ok.reshape(self.stack.size, -1).all(1)


def is_due(step: int, every: int, offset: int = 0) -> bool:
    """Whether something done every so many steps comes at this one."""
    return (step - offset) % every == 0


def offsets(costs: Sequence[float], every: int) -> list[int]:
    """Steps of a period at which jobs come, so that no step has much more to do than another.

    The dearest first, each to the step with least to do.

    Two dear jobs and two cheap ones over two steps:
        >>> offsets([8, 1, 8, 1], 2)
        [0, 0, 1, 1]
    """
    loads, chosen = [0.0] * every, [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: -costs[j]):
        chosen[j] = loads.index(min(loads))
        loads[chosen[j]] += costs[j]
    return chosen


@dataclass(eq=False)
class _Verdict:
    """Flags on their way to the host."""

    job: Job
    live: Tensor
    ok: Tensor
    event: torch.cuda.Event | None = None

    @property
    def arrived(self) -> bool:
        return self.event is None or self.event.query()


@dataclass(eq=False)
class Refresher:
    """Solves jobs, keeps the last good results, counts failures.

    count: index in each stack's "counts" of the number of failures. hint: what to do about them.
    """

    count: int
    hint: str
    pending: list[_Verdict] = field(default_factory=list)

    def solve(self, jobs: Iterable[Job]) -> None:
        """Solve all jobs, those of one size in one batch, and keep what is good.

        Raises: NumericalError as `settle`.
        """
        batches: dict[tuple, list[Job]] = {}
        for job in jobs:
            batches.setdefault(job.key, []).append(job)
        loads = [0.0] * distributed.size()
        for members in sorted(batches.values(), key=lambda members: -members[0].n):
            self._solve_together(members, loads)
        self.settle()

    def settle(self, *, wait: bool = False) -> None:
        """Look at the flags that have arrived: try failures again in float64, count what fails.

        wait: for all of them; needed before a stack's tensors change their shapes. Several
        processes always do, or one might try again a step earlier than another.

        Raises: NumericalError naming a layer that failed several times in a row, or had no result
        to fall back on.
        """
        for verdict in self.pending:
            if (wait or distributed.size() > 1) and verdict.event is not None:
                verdict.event.synchronize()
        arrived = [verdict for verdict in self.pending if verdict.arrived]
        self.pending = [verdict for verdict in self.pending if verdict not in arrived]
        for verdict in arrived:
            if bool(verdict.ok.all()):
                verdict.job.failures.masked_fill_(verdict.live, 0)
            else:
                self._again(verdict)

    def _solve_together(self, jobs: list[Job], loads: list[float]) -> None:
        factors = [job.matrices() for job in jobs]
        sizes = [len(M) for M in factors]
        together = factors[0] if len(jobs) == 1 else torch.cat(factors)
        dampings = torch.cat([job.dampings() for job in jobs])
        results, oks = distributed.solved(jobs[0].solver, together, dampings, loads)
        for job, *solved in zip(jobs, results.split(sizes), oks.split(sizes), strict=True):
            result, ok = job.shaped(*solved)
            live = job.live
            job.stack.solved.setdefault(job.result, set()).update(job.blocks)
            if not isinstance(job.damped_by, Tensor):
                job.stack.group[SOLVED_WITH] = job.damped_by
            _keep(job, result, ok & live)
            self.pending.append(_on_its_way(job, live, ok | ~live))

    def _again(self, verdict: _Verdict) -> None:
        job = verdict.job
        result, good = job.shaped(*job.solver(job.matrices().double(), job.dampings().double()))
        failed = ~verdict.ok.to(good.device)
        _keep(job, result.to(job.stack.dtype), good & failed)
        failures, lost = job.failures, failed & ~good
        failures.copy_(torch.where(lost, failures + 1, failures * ~verdict.live))
        job.stack["counts"][:, self.count] += lost
        had_none = job.stack[job.result].flatten(1).abs().sum(1) == 0
        stop = (failures >= PATIENCE) | (lost & had_none)
        if bool(stop.any()):
            self._give_up(job, stop)

    def _give_up(self, job: Job, stop: Tensor) -> None:
        names = [b.name for b in job.stack.blocks if bool(stop[job.stack.places[b]].any())]
        times = int(job.failures.max())
        raise NumericalError(
            f"layer '{names[0]}': {job.factor} could not be inverted, {times} times in a row; "
            f"{self.hint}"
        )


def _keep(job: Job, result: Tensor, ok: Tensor) -> None:
    """stack[result] <- result where ok, and what goes with it, in place: views stay live."""
    stack = job.stack
    for name, new in {job.result: result, **job.beside}.items():
        if name not in stack:
            # row by row, as a loaded one is: products of the other layout round differently
            stack.hold(**{name: torch.zeros_like(new, memory_format=torch.contiguous_format)})
        held = stack[name]
        kept = new if known_true(ok) else torch.where(per(ok, held) > 0, new, held)
        if name == job.result and job.replacing is not None:
            job.replacing(held, kept)
        held.copy_(kept)


def _on_its_way(job: Job, live: Tensor, ok: Tensor) -> _Verdict:
    if free_to_read(ok):
        return _Verdict(job, live, ok)
    return _Verdict(job, live, *to_host(ok))


def to_host(flags: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """A copy for Python to read, under way from a GPU, and the event that says it is there."""
    host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
