"""Which optimizer is ahead after the same seconds of training?

Each trains alone, on all cores, from the same start and with the same batches, at the problem's
recommended settings, until the last of the given seconds; the clock stands while it is evaluated.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress

from .. import problems, training
from ..reports import comparison_tables
from ..reports.summaries import number
from ..results import records
from ..results.records import loss_row
from ..results.runs import running
from ..results.tables import Table
from ..training.optimizers import ONE_SOLVE_A_STEP
from ..training.workers import results_of

NAME = "equal_seconds"
FIXED = "seed", "seconds", "device"
POINTS = 24  # evaluations on a curve, evenly spread over the logarithm of the seconds


@dataclass(frozen=True)
class Grid:
    """Settings of the study. seconds: training times at which the optimizers are ranked.

    spares: an optimizer that diverges is tried again, with up to so many following seeds.
    """

    problem: str = "mnist-autoencoder"
    optimizers: Sequence[str] = field(default_factory=lambda: ONE_SOLVE_A_STEP)
    seed: int = 0
    spares: int = 0
    seconds: Sequence[float] = (60.0, 180.0, 600.0)
    device: str = "cpu"

    @property
    def marks(self) -> list[float]:
        """Seconds at which a training is evaluated."""
        last = max(self.seconds)
        return sorted({*map(float, self.seconds), *np.geomspace(last / 100, last, POINTS).tolist()})

    @property
    def seeds(self) -> range:
        """The seed, and those that may be tried after it."""
        return range(self.seed, self.seed + self.spares + 1)


TINY = Grid("digits-autoencoder-small", ("kfac", "adam"), seconds=(0.2, 0.5))


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; losses are written as they are evaluated.

    The header's "ended" has {optimizer: {seed: why it ended early, or ""}}.
    resume: the folder of an earlier run; what was tried is not tried again.
    Raises: ValueError for a folder of another study or problem or of other `FIXED` settings, or for
    an unknown optimizer.
    """
    with running(NAME, vars(grid), __doc__, results, resume, FIXED) as (
        folder,
        header,
    ):
        ended = header.setdefault("ended", {})
        task = progress.add_task("training", total=len(grid.optimizers))
        for name in grid.optimizers:
            tried = ended.setdefault(name, {})
            for seed in grid.seeds:
                if "" in tried.values():
                    break
                if str(seed) not in tried:
                    tried[str(seed)] = _alone(folder, grid, name, seed)
                    records.write_header(folder, header)
            progress.advance(task)
        own = {name: ended[name] for name in grid.optimizers}
        header["ranking"] = table(records.read(folder), own, grid).as_header()
    return folder


def _alone(folder: Path, grid: Grid, name: str, seed: int) -> str:
    ((_, ended),) = results_of(train, [(folder, grid, name, seed)], workers=1)
    return ended


def train(folder: Path, grid: Grid, name: str, seed: int) -> str:
    """Train on all cores and record losses as part `name`; returns why it ended early, or "".

    Losses of an earlier seed, which diverged, are replaced.

    Raises: numerical errors before the first evaluation, and all other errors.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    problem = problems.get(grid.problem)
    settings = training.Settings(problem, name, training.FOREVER, seed, device=grid.device)
    shared = {"run": folder.name, "study": NAME}
    rows: list[dict[str, Any]] = []
    try:
        for state in _at(grid.marks, settings):
            place = training.place(settings, state)
            for metric, value in training.evaluated(state, problem).items():
                rows.append({**shared, **place, **loss_row(metric, value)})
            records.put(folder, name, rows)
    except training.NUMERICAL_ERRORS as error:
        if not rows:
            raise
        return str(error)
    return ""


def _at(marks: Sequence[float], settings: training.Settings) -> Iterator[training.TrainingState]:
    """States before the first step and at the first step past each mark, in seconds."""
    due = list(marks)
    for state in training.steps(settings):
        if state.step and state.seconds < due[0]:
            continue
        yield state
        due = [mark for mark in due if mark > state.seconds]
        if not due:
            return


def table(frame: pd.DataFrame, ended: dict[str, dict[str, str]], grid: Grid) -> Table:
    """Training losses and ranks at equal seconds, best final loss first.

    ended: {optimizer: {seed: why it ended early, or ""}}; the last seed's losses are in the frame.
    """
    losses = frame[frame["metric"] == "train_loss"]
    own = {name: losses[losses["optimizer"] == name].sort_values("step") for name in ended}
    found = {name: [_after(own[name], mark) for mark in grid.seconds] for name in ended}
    ranks = pd.DataFrame(found).T.rank(method="min")
    rows = []
    for name in sorted(ended, key=lambda name: found[name][::-1]):
        cells = [
            f"{loss:#.4g} ({ranks[k][name]:.0f})" if np.isfinite(loss) else "∞"
            for k, loss in enumerate(found[name])
        ]
        settings = list(problems.get(grid.problem).optimizers.get(name, {}).items())
        reasons = list(ended[name].values())
        reason = f": {reasons[-1].partition(';')[0]}" if reasons[-1] else ""
        printed = comparison_tables.settings(settings, [settings]) + reason
        epochs = number(float(own[name]["epoch"].max()))
        diverged = f"{sum(map(bool, reasons))} of {len(reasons)}"
        rows.append([name, printed, list(ended[name])[-1], diverged, *cells, epochs])
    caption = (
        "Training loss, and rank, at the first step that ended after so many seconds of training; "
        f"each optimizer alone on {_where(grid.device)} at the settings that the problem "
        f"recommends, else at its own defaults; seed {grid.seed}{_or_later(grid)}."
    )
    marks = [f"{mark:g} s" for mark in grid.seconds]
    columns = ["optimizer", "settings", "seed", "diverged", *marks, "epochs"]
    return Table(caption, columns, rows)


def _or_later(grid: Grid) -> str:
    return f", or the first up to {grid.seeds[-1]} that did not diverge" if grid.spares else ""


def _where(device: str) -> str:
    return f"{os.cpu_count()} cores" if device == "cpu" else device


def _after(losses: pd.DataFrame, mark: float) -> float:
    """Loss at the first evaluation after `mark` seconds; infinite if there is none."""
    reached = losses.loc[losses["seconds"] >= mark, "value"]
    value = float(reached.iloc[0]) if len(reached) else np.inf
    return value if np.isfinite(value) else np.inf
