"""How wrong is each curvature approximation, layer by layer, as training goes on?

Trains one problem with several optimizers. Every k steps the live curvature of those that have one,
and approximations built from data, are held against the exact Hessian and GGN block of each layer.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from .. import problems, training
from ..measuring.measurement import Plan, definitions
from ..measuring.snapshots import Snapshot, SnapshotRecords, measure_all, take
from ..results import records
from ..results.runs import running
from ..training import checkpoints

NAME = "error_along_training"
DAMPED = ("preconditioned_condition", "step_cosine")  # each costs a factorisation of the block


@dataclass(frozen=True)
class Grid:
    """Settings of the study.

    points: measurements per optimizer, evenly spaced with the first at step 0 and the last at the
    end. Damped metrics are taken at every `damped_every`-th of them, matrices at the ends.
    """

    problem: str = "digits-autoencoder"
    optimizers: Sequence[str] = ("kbfgs", "kfac", "adam")
    seed: int = 0
    epochs: int = 0  # 0: the problem's
    points: int = 7
    examples: int = 256
    damped_every: int = 6
    workers: int = 2
    device: str = "cpu"


TINY = Grid("digits-autoencoder-small", epochs=2, points=2, examples=32, damped_every=1)


def run(grid: Grid, results: Path, progress: Progress) -> Path:
    """Run the study and return the run's folder; rows are written as they are measured.

    A run that diverges keeps its rows; its last finite parameters are saved beside them and the
    header's status says so.

    Raises: ValueError as `options.options`.
    """
    plan = Plan(damping=problems.get(grid.problem).measure_damping, examples=grid.examples)
    diverged: list[str] = []
    with running(NAME, vars(grid), __doc__, results, None) as (folder, header):
        header["metrics"] = definitions([*plan.metrics, "noise_floor"])
        records.write_header(folder, header)
        measuring = progress.add_task("measuring", total=grid.points * len(grid.optimizers))
        for found in measure_all(_snapshots(grid, plan, folder, progress, diverged), grid.workers):
            _write(folder, found)
            header["not_measured"] = found.left_out
            progress.advance(measuring)
        if diverged:
            header["status"] = "; ".join(diverged)
    return folder


def _snapshots(
    grid: Grid, plan: Plan, folder: Path, progress: Progress, diverged: list[str]
) -> Iterator[Snapshot]:
    """Train with each optimizer in turn and yield the snapshots to measure."""
    setting = problems.get(grid.problem)
    for name in grid.optimizers:
        settings = training.Settings(
            setting, name, grid.epochs or setting.epochs, grid.seed, device=grid.device
        )
        try:
            yield from _trained(settings, grid, plan, progress)
        except training.NUMERICAL_ERRORS as error:
            diverged.append(f"diverged: {name}: {error}")
            if isinstance(error, training.DivergedError):
                checkpoints.save_parameters(error.parameters, folder / f"last-finite-{name}.pt")


def _trained(
    settings: training.Settings, grid: Grid, plan: Plan, progress: Progress
) -> Iterator[Snapshot]:
    task = progress.add_task(f"training {settings.optimizer}", total=None)
    cheap = dataclasses.replace(plan, metrics=[m for m in plan.metrics if m not in DAMPED])
    due: dict[int, int] = {}
    for state in training.steps(settings):
        total = settings.epochs * state.steps_per_epoch
        due = due or measuring_steps(total, grid.points)
        if state.step in due:
            place = due[state.step]
            ends = place in (0, len(due) - 1)
            full = ends or place % grid.damped_every == 0
            losses = training.evaluated(state, settings.problem)
            yield take(settings, state, plan if full else cheap, losses, keep_matrices=ends)
        progress.update(task, total=total, completed=state.step)


def measuring_steps(total: int, points: int) -> dict[int, int]:
    """`points` steps evenly spread over 0..total, as {step: its index}.

    >>> measuring_steps(60, 4)
    {0: 0, 20: 1, 40: 2, 60: 3}
    """
    points = min(points, total + 1)
    places = {round(k * total / max(points - 1, 1)) for k in range(points)}
    return {step: place for place, step in enumerate(sorted(places))}


def _write(folder: Path, found: SnapshotRecords) -> None:
    named = [{**row, "run": folder.name, "study": NAME} for row in found.rows]
    records.append(folder, ({c: row[c] for c in records.COLUMNS} for row in named))
    for key, pictures in found.matrices:
        records.save_matrices(folder, key, pictures)
