"""Snapshots of a training, measured by worker processes while training goes on.

Training yields its state; what is needed to measure it (the parameters and the live curvatures) is
copied out, so measuring never disturbs the run, and the copies are measured in parallel with one
thread each, which suits matrices of this size better than one process with all threads.
"""

import io
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, as_completed, wait
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronscope.diag import Operator, Problem

from .. import problems
from ..data import Data
from ..results.records import loss_row
from ..training import workers
from ..training.loop import Settings, place
from ..training.state import TrainingState
from . import measurement

Lives = dict[str, dict[str, Operator]]  # by approximation and block


@dataclass(frozen=True)
class Snapshot:
    """Copies of what measuring needs of a run at one step."""

    settings_key: dict[str, Any]  # run-independent columns of the rows: problem, optimizer, ...
    parameters: dict[str, Tensor]
    lives: Lives
    losses: dict[str, float]
    plan: measurement.Plan
    keep_matrices: bool


@dataclass(frozen=True)
class SnapshotRecords:
    """Measured rows (without run and study), matrices with their keys, and blocks left out."""

    rows: list[dict[str, Any]]
    matrices: list[tuple[dict[str, Any], dict[str, np.ndarray]]]
    left_out: list[str] = field(default_factory=list)


def take(
    settings: Settings,
    state: TrainingState,
    plan: measurement.Plan,
    losses: dict[str, float],
    keep_matrices: bool,
) -> Snapshot:
    """Take a snapshot; losses as `training.evaluate` returns them."""
    key = place(settings, state)
    parameters = {n: t.detach().cpu().clone() for n, t in state.model.state_dict().items()}
    lives = _on_cpu(measurement.live_curvatures(settings.optimizer, state), settings.device)
    return Snapshot(key, parameters, lives, losses, plan, keep_matrices)


def _on_cpu(lives: Lives, device: str) -> Lives:
    """The same operators with their tensors on the CPU, where they are measured."""
    if device == "cpu":
        return lives
    content = io.BytesIO()
    torch.save(lives, content)
    content.seek(0)
    moved: Lives = torch.load(content, map_location="cpu", weights_only=False)
    return moved


def measure_all(snapshots: Iterable[Snapshot], count: int) -> Iterator[SnapshotRecords]:
    """Measure snapshots as they come, in `count` processes; results in order of completion.

    Taking the next snapshot waits while more than four per worker are queued.
    """
    pool = workers.shared_pool(count)
    pending: set[Future] = set()
    try:
        for snapshot in snapshots:
            pending.add(pool.submit(measure, snapshot))
            full = len(pending) > 4 * count
            done, pending = wait(pending, None if full else 0, FIRST_COMPLETED)
            yield from (future.result() for future in done)
        yield from (future.result() for future in as_completed(pending))
    finally:
        for future in pending:  # nobody waits for these after an error
            future.cancel()


def measure(snapshot: Snapshot) -> SnapshotRecords:
    """All rows of one snapshot, computed with one thread."""
    torch.set_num_threads(1)
    setting = problems.get(snapshot.settings_key["problem"])
    problem = rebuild(setting, snapshot)
    rows = [loss_row(name, value) for name, value in snapshot.losses.items()]
    rows += measurement.measure(problem, snapshot.plan, snapshot.lives)
    complete = [{**snapshot.settings_key, **row} for row in rows]
    pictures = _pictures(snapshot, problem) if snapshot.keep_matrices else []
    return SnapshotRecords(complete, pictures, measurement.not_measured(problem))


def _pictures(
    snapshot: Snapshot, problem: Problem
) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
    found = []
    for block in measurement.layers(problem):
        for of in snapshot.plan.truths:
            key = {name: snapshot.settings_key[name] for name in ("optimizer", "seed", "step")}
            key |= {"block": block.name, "truth": of, "size": block.d}
            pictures = measurement.matrices(problem, block, of, snapshot.plan, snapshot.lives)
            found.append((key, pictures))
    return found


def rebuild(setting: problems.TrainingProblem, snapshot: Snapshot) -> Problem:
    """The Problem of the snapshot's parameters on the first training examples, in float64.

    As it is evaluated: norms by their running statistics, without dropout.
    """
    model = setting.model().eval()
    model.load_state_dict(snapshot.parameters)
    data: Data = setting.data()
    rows = slice(snapshot.plan.examples)
    inputs, targets = data.train_inputs[rows], data.train_targets[rows]
    return Problem(model, setting.loss, inputs, targets, dtype=torch.float64)
