"""For how many seeds does a training diverge, and at which learning rates and dampings?

Each optimizer is trained at every point of a grid of learning rates and dampings around the
problem's recommended ones, with every seed. A training has diverged where its loss is not finite,
where it rose to 100 times the first one, where a factor could not be inverted, or where it ends no
lower than it began.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.progress import Progress

from ... import problems
from ...reports import comparison_tables
from ...reports.summaries import number, share, span
from ...results.runs import running
from ...results.tables import Table
from ...training import trials
from ...training.trials import Trial
from ...tuning.grids import candidates

NAME = "stability"


@dataclass(frozen=True)
class Grid:
    """What the study runs over; fields as in `optimizers_compared.Grid`."""

    problem: str = "mnist-autoencoder"
    optimizers: Sequence[str] = ("kbfgs", "kfac", "mbf", "shampoo", "tnt")
    seed: int = 0
    seeds: int = 20
    epochs: int = 1
    lr_factors: Sequence[float] = (1.0,)
    damping_factors: Sequence[float] = (1.0,)
    workers: int = 2
    device: str = "cpu"


TINY = Grid("digits-autoencoder-small", ("kbfgs", "sgd"), seeds=2, lr_factors=(1.0, 1e4))


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; each training is written when it has ended.

    resume: as in `runs.running`; trainings that are there are kept.
    Raises: ValueError as `runs.running`, or an unknown optimizer.
    """
    with running(NAME, vars(grid), __doc__, results, resume) as (folder, header):
        points = {name: _points(grid, name) for name in grid.optimizers}
        wanted = itertools.chain(*itertools.chain(*points.values()))
        trials.complete_all(folder, wanted, grid.workers, "training", progress)
        found = pd.DataFrame(
            [outcome(folder, own) for name in points for own in points[name]],
        )
        header["stability"] = found.to_dict("records")
        header["comparison"] = table(found, grid).as_header()
        header["shown"] = _record(grid, folder, points)
    return folder


def _points(grid: Grid, optimizer: str) -> list[list[Trial]]:
    """For each point of the optimizer's grid its trainings, one per seed."""
    factors = grid.lr_factors, grid.damping_factors
    own = candidates(grid.problem, optimizer, *factors, grid.seed, grid.epochs, grid.device)
    seeds = range(grid.seed, grid.seed + grid.seeds)
    return [[dataclasses.replace(trial, seed=seed) for seed in seeds] for trial in own]


def outcome(folder: Path, own: Sequence[Trial]) -> dict[str, Any]:
    """Divergences and final losses at one point of the grid, as a row of the map.

    steps: of those that stopped early, where; loss: median training loss at the end of those that
    converged, NaN where none did.
    """
    steps, losses = [], []
    for trial in own:
        frame = trials.read(folder, trial)
        end, _ = trials.fell(frame, trial.epochs)
        if np.isfinite(end):
            losses.append(end)
        elif frame["ended"].iloc[0]:
            steps.append(int(frame["last_step"].iloc[0]))
    settings = dict(own[0].settings)
    return {
        "optimizer": own[0].optimizer,
        **{name: settings.get(name, np.nan) for name in ("lr", "kl_clip", "damping")},
        "seeds": len(own),
        "diverged": len(own) - len(losses),
        "steps": sorted(steps),
        "loss": float(np.median(losses)) if losses else np.nan,
    }


def table(found: pd.DataFrame, grid: Grid) -> Table:
    """A row per optimizer and point of its grid."""
    rows = []
    for row in found.to_dict("records"):
        own = [(n, row[n]) for n in ("lr", "kl_clip", "damping") if np.isfinite(row[n])]
        rows.append(
            [
                row["optimizer"],
                comparison_tables.settings(own, [own]),
                share(row["diverged"], row["seeds"]),
                span(row["steps"]),
                number(row["loss"]),
            ]
        )
    caption = (
        f"{grid.seeds} seed(s) from {grid.seed} on, {grid.epochs} epoch(s). diverged: with a 95 % "
        "Wilson interval. at step: median and range of those that stopped early. train loss: "
        "median at the end, of those that converged."
    )
    columns = ["optimizer", "settings", "diverged", "at step", "train loss"]
    return Table(caption, columns, rows)


def _record(grid: Grid, folder: Path, points: dict[str, list[list[Trial]]]) -> list[str]:
    """Put the losses of all trainings into the records; the names of those at the middle points.

    All names where no point is in the middle.
    """
    shown, all_names = [], []
    recommended = problems.get(grid.problem).optimizers
    for name, grids in points.items():
        labelled: dict[str, list[Trial]] = {}
        for own in grids:
            settings = dict(own[0].settings)
            middle = all(settings[k] == v for k, v in recommended.get(name, {}).items())
            printed = comparison_tables.settings(own[0].settings, [own[0].settings])
            label = name if middle else f"{name} {printed}"
            shown += [name] if middle else []
            all_names.append(label)
            labelled.setdefault(label, []).extend(own)
        trials.record(folder, name, NAME, labelled)
    return shown or all_names
