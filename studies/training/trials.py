"""Trials: whole trainings side by side, each kept in a file of its own as soon as it has ended.

    results/<run>/trials/<optimizer>-<settings>-seed<seed>.parquet

A trial that is there is not run again, unless it was asked for fewer epochs than are wanted now.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import Progress

from .. import problems
from ..results import records
from ..results.records import loss_row
from . import loop
from .workers import results_of

FOLDER = "trials"


@dataclass(frozen=True)
class Trial:
    """One training with all of the optimizer's settings, as (name, value) in order of the names.

    batch_size: 0 is the problem's. device: part of what it is, for seconds are compared.
    """

    problem: str
    optimizer: str
    settings: tuple[tuple[str, Any], ...]
    seed: int
    epochs: int
    batch_size: int = 0
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Name of its file: what it is, but for how long it goes on."""
        settings = [f"{name}={value}" for name, value in self.settings]
        batch = [f"batch{self.batch_size}"] if self.batch_size else []
        device = [] if self.device == "cpu" else [self.device.replace(":", "")]
        return "-".join([self.optimizer, *settings, *batch, *device, f"seed{self.seed}"])


def trial(
    problem: str, optimizer: str, changes: Mapping[str, Any], seed: int, epochs: int
) -> Trial:
    """A trial with the problem's recommended settings and `changes` over them."""
    settings = {**problems.get(problem).optimizers.get(optimizer, {}), **changes}
    return Trial(problem, optimizer, tuple(sorted(settings.items())), seed, epochs)


class EndedError(RuntimeError):
    """Why a training stopped early, and at which step: divergence, or a factor not inverted."""

    def __init__(self, why: str, step: int) -> None:
        super().__init__(why)
        self.step = step


def epochs(trial: Trial) -> Iterator[list[dict[str, Any]]]:
    """Train with one thread; at the start and after each epoch the rows of its losses.

    A row: (step, epoch, seconds, metric, value), with seconds of training, evaluation excluded.
    Raises: EndedError for what comes up in the numbers (`loop.NUMERICAL_ERRORS`) after the first
    evaluation; any other error as it is.
    """
    torch.set_num_threads(1)
    problem, step = problems.get(trial.problem), -1
    settings = loop.Settings(
        problem,
        trial.optimizer,
        trial.epochs,
        trial.seed,
        trial.batch_size,
        trial.device,
        dict(trial.settings),
    )
    try:
        for state in loop.steps(settings):
            step = state.step
            if step % state.steps_per_epoch == 0:
                place = {"step": step, "epoch": state.epoch, "seconds": state.seconds}
                found = loop.evaluated(state, problem)
                yield [{**place, "metric": name, "value": v} for name, v in found.items()]
    except loop.NUMERICAL_ERRORS as error:
        if step < 0:
            raise
        raise EndedError(str(error), getattr(error, "step", step)) from error


def train(trial: Trial) -> pd.DataFrame:
    """All rows of `epochs`, with (epochs, ended, last_step): its `epochs`, why it stopped before.

    ended: empty where it did not. last_step: at which it stopped, -1 where it did not.
    Raises: as `epochs`, but for EndedError.
    """
    rows, ended, last_step = [], "", -1
    try:
        for found in epochs(trial):
            rows += found
    except EndedError as error:
        ended, last_step = str(error), error.step
    return pd.DataFrame(rows).assign(epochs=trial.epochs, ended=ended, last_step=last_step)


def complete(run: Path, trials: Iterable[Trial], workers: int) -> Iterator[Trial]:
    """Train what is missing, `workers` at once, and yield each trial when its file is there.

    Of trials that differ only in their epochs the longest is trained.
    """
    longest: dict[str, Trial] = {}
    for trial in sorted(trials, key=lambda trial: trial.epochs):
        longest[trial.name] = trial
    missing = [trial for trial in longest.values() if not _is_done(run, trial)]
    yield from (trial for trial in longest.values() if trial not in missing)
    by_length = sorted(missing, key=lambda trial: trial.epochs, reverse=True)  # else as they came
    for (trial,), frame in results_of(train, ((trial,) for trial in by_length), workers):
        records.write_atomically(_path(run, trial), frame.to_parquet(index=False))
        yield trial


def complete_all(
    run: Path, trials: Iterable[Trial], workers: int, what: str, progress: Progress
) -> None:
    """As `complete`, with a progress bar."""
    wanted = list(trials)
    task = progress.add_task(what, total=len({trial.name for trial in wanted}))
    for _ in complete(run, wanted, workers):
        progress.advance(task)


def record(run: Path, part: str, study: str, labelled: Mapping[str, Iterable[Trial]]) -> None:
    """Put losses of trials into the run's records; their labels are the names of the optimizers."""
    rows: list[dict[str, Any]] = []
    for label, own in labelled.items():
        for trial in own:
            losses = read(run, trial).to_dict("records")
            rows += as_records(run, trial, study, label, losses)
    records.put(run, part, rows)


def as_records(
    run: Path, trial: Trial, study: str, label: str, losses: Iterable[Mapping[Any, Any]]
) -> list[dict[str, Any]]:
    """Rows of `epochs` as rows for the records, with `label` as name of the optimizer."""
    shared = {
        "run": run.name,
        "study": study,
        "problem": trial.problem,
        "optimizer": label,
        "seed": trial.seed,
    }
    return [
        {
            **shared,
            **loss_row(row["metric"], row["value"]),
            **{name: row[name] for name in ("step", "epoch", "seconds")},
        }
        for row in losses
    ]


def read(run: Path, trial: Trial) -> pd.DataFrame:
    """The rows of a trial up to its epochs, as `train` returns them."""
    frame = pd.read_parquet(_path(run, trial))
    return frame[frame["epoch"] <= trial.epochs]


def read_all(run: Path, named: Mapping[str, Iterable[Trial]]) -> dict[str, list[pd.DataFrame]]:
    """`read` of each trial, under the same names."""
    return {name: [read(run, trial) for trial in own] for name, own in named.items()}


def best(run: Path, candidates: Sequence[Trial]) -> Trial:
    """The trial with the least training loss at its end; one alone need not have been trained."""
    if len(candidates) == 1:
        return candidates[0]
    return min(candidates, key=lambda trial: loss_at_the_end(run, trial))


def fell(frame: pd.DataFrame, epochs: int) -> tuple[float, float]:
    """Training loss and seconds after the epochs; (inf, NaN) where it is no lower than at first."""
    rows = frame[frame["metric"] == "train_loss"]
    last = rows[rows["epoch"] == epochs]
    if last.empty or not last["value"].iloc[0] < rows["value"].iloc[0]:
        return np.inf, np.nan
    return float(last["value"].iloc[0]), float(last["seconds"].iloc[0])


def loss_at_the_end(run: Path, trial: Trial) -> float:
    """Training loss after the trial's epochs; infinite where it did not get there."""
    frame = read(run, trial)
    rows = frame[(frame["epoch"] == trial.epochs) & (frame["metric"] == "train_loss")]
    value = float(rows["value"].iloc[0]) if len(rows) else np.inf
    return value if np.isfinite(value) else np.inf


def _path(run: Path, trial: Trial) -> Path:
    return run / FOLDER / f"{trial.name}.parquet"


def _is_done(run: Path, trial: Trial) -> bool:
    if not _path(run, trial).is_file():
        return False
    frame = pd.read_parquet(_path(run, trial), columns=["epochs", "ended"])
    return bool(frame["epochs"].iloc[0] >= trial.epochs or frame["ended"].iloc[0])
