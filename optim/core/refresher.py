"""Batched inversion of factors, with a second try in float64 and a count of failures.

On a GPU nobody waits for the verdict: it is copied in the background, the second try comes later.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..linalg.basics import free_to_read, known_true, per
from . import distributed
from .errors import NumericalError
from .inversions import SOLVED_WITH, Job

PATIENCE = 3  # failures in a row before training is stopped


@dataclass(eq=False)
class _Verdict:
    """Success flags of a job, being copied to the host."""

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

        wait: for all of them, before a stack's tensors change their shapes; several processes
        always do, or one might try again a step earlier than another.

        Raises: NumericalError naming a layer that failed several times in a row or never succeeded.
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
        job.stack["counts"][job.place, self.count] += lost
        had_none = job.stack[job.result][job.place].flatten(1).abs().sum(1) == 0
        stop = (failures >= PATIENCE) | (lost & had_none)
        if bool(stop.any()):
            raise NumericalError(
                f"layer '{job.name_of(stop)}': {job.factor} could not be inverted, "
                f"{int(failures.max())} times in a row; {self.hint}"
            )


def _keep(job: Job, result: Tensor, ok: Tensor) -> None:
    """stack[result] <- result where ok, and what goes with it, in place: views stay live."""
    for name, new in {job.result: result, **job.beside}.items():
        held = job.place_for(name, new)
        kept = new if known_true(ok) else torch.where(per(ok, held) > 0, new, held)
        if name == job.result and job.replacing is not None:
            job.replacing(held, kept, job.place)
        held.copy_(kept)


def _on_its_way(job: Job, live: Tensor, ok: Tensor) -> _Verdict:
    if free_to_read(ok):
        return _Verdict(job, live, ok)
    return _Verdict(job, live, *to_host(ok))


def to_host(flags: Tensor) -> tuple[Tensor, torch.cuda.Event]:
    """An asynchronous copy to the host, and the event that marks its arrival."""
    host = torch.empty(flags.shape, dtype=torch.bool, device="cpu", pin_memory=True)
    host.copy_(flags, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event
