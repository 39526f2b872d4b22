"""One training run with records and checkpoints: the command `kronscope train`."""

import dataclasses
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pandas as pd
from loky.process_executor import TerminatedWorkerError
from rich.progress import Progress

from .. import measuring, problems, training
from ..measuring.during_training import DuringTraining
from ..results import options, records
from ..results.records import loss_row
from ..results.runs import running
from ..results.tables import Table
from ..training import checkpoints

NAME = "train"
CHECKPOINT = "checkpoint.pt"
LAST_FINITE = "last-finite.pt"
QUESTION = "How do the losses change along this training?"
GOES_ON = "a run goes on with what it has, but for epochs and device"


@dataclass(frozen=True)
class Outcome:
    """Folder and records of a training run, and why it ended early, if it did.

    measuring: what measuring beside it took, in words. stopped: by SIGTERM, at a checkpoint from
    which it can go on.
    """

    folder: Path
    frame: pd.DataFrame
    diverged: str = ""
    stopped: bool = False
    measuring: str = ""


class Stopped(Exception):
    """Raised after SIGTERM, once the checkpoint of the last step is written."""


def train(
    settings: training.Settings,
    results: Path,
    progress: Progress,
    resume: Path | None = None,
    during: DuringTraining | None = None,
) -> Outcome:
    """Train, writing losses and a checkpoint after every epoch; evaluation time is not counted.

    resume: the folder of an earlier run of the same settings, which then goes on in place, for more
    epochs or on another device if these differ.
    during: measures at ends of epochs; what it spent goes into the header.
    A run that diverges keeps its records; the last parameters with a finite loss are in
    last-finite.pt and the header's status says so. SIGTERM ends the run after the step under way,
    with a checkpoint of that.

    Raises: ValueError for a folder without a checkpoint, or of a run with other settings, and for a
    device that is not there.
    """
    options.device(settings.device)
    if resume is not None:
        _check_same(resume, settings)
    config = vars(settings) | {"problem": settings.problem.name}
    with running(NAME, config, QUESTION, results, resume) as (folder, header):
        if during is not None:
            header["metrics"] = measuring.definitions([*during.plan.metrics, "noise_floor"])
            during.resume(header.get("measuring", {}))
        _train(settings, folder, header, progress, resume, during)
    frame, status = records.read(folder), str(header["status"])
    said = "" if during is None else during.summary(frame["seconds"].max())
    diverged = status.removeprefix("diverged: ") if status.startswith("diverged: ") else ""
    return Outcome(folder, frame, diverged, status.startswith("stopped"), said)


def _train(
    settings: training.Settings,
    folder: Path,
    header: dict[str, Any],
    progress: Progress,
    resume: Path | None,
    during: DuringTraining | None,
) -> None:
    """Train to the end, or until the header's status says why it ended before."""
    try:
        with _sigterm() as asked:
            for state in _epochs(settings, folder, resume, progress, asked):
                new = state.step > _last_step(folder)  # else the checkpoint is the older one
                losses = training.evaluated(state, settings.problem) if new else {}
                # before measuring, which may be killed with the run or for its memory
                checkpoints.save(state, folder / CHECKPOINT)
                if new:
                    records.append(folder, _rows(folder, settings, state, during, losses))
                    if during is not None:
                        header["measuring"] = during.counters()
                        records.write_header(folder, header)
    except Stopped as reason:
        header["status"] = f"stopped: {reason}"
    except TerminatedWorkerError:
        if not asked.is_set():
            raise
        header["status"] = "stopped: by SIGTERM while it was measuring; --resume goes on"
    except training.NUMERICAL_ERRORS as error:
        header["status"] = f"diverged: {error}"
        if isinstance(error, training.DivergedError):  # else the last checkpoint is good
            checkpoints.save_parameters(error.parameters, folder / LAST_FINITE)


def _check_same(folder: Path, now: training.Settings) -> None:
    """Raises: ValueError as `settings_of`, or if more than epochs or device differ."""
    earlier = settings_of(folder)
    for name in ("optimizer", "seed", "batch_size", "hyper"):
        old, new = getattr(earlier, name), getattr(now, name)
        if old != new:
            raise ValueError(f"{folder} was trained with {name} {old}, not {new}: {GOES_ON}")
    if earlier.problem.name != now.problem.name:
        known = earlier.problem.name
        raise ValueError(f"{folder} holds problem {known}, not {now.problem.name}: {GOES_ON}")


def settings(
    problem: str | None, chosen: dict[str, Any], resume: Path | None = None
) -> training.Settings:
    """Settings of a new run, or those of the one to go on with, and what is chosen over them.

    chosen: fields of `training.Settings`; every other name is of the optimizer's hyper-parameters.
    Raises: ValueError without a problem, and as `settings_of`.
    """
    if resume is not None:
        found = settings_of(resume)
        name = problem or found.problem.name
    elif problem is None:
        raise ValueError(f"name a problem to train; known: {sorted(problems.PROBLEMS)}")
    else:
        optimizer, name = chosen.get("optimizer", "kbfgs"), problem
        epochs = problems.get(name).epochs_of(optimizer)
        found = training.Settings(problems.get(name), optimizer, epochs)
    own = {field.name for field in dataclasses.fields(found)}
    changed = {name: value for name, value in chosen.items() if name in own}
    hyper = {name: value for name, value in chosen.items() if name not in own}
    return dataclasses.replace(
        found, problem=problems.get(name), **changed, hyper={**found.hyper, **hyper}
    )


def settings_of(folder: Path) -> training.Settings:
    """Settings of an earlier run of `train`. Raises: ValueError for another or an empty folder."""
    if not (folder / CHECKPOINT).is_file():
        raise ValueError(f"no {CHECKPOINT} in {folder}; `kronscope train` writes one")
    header = records.read_header(folder)
    if header.get("study") != NAME:
        raise ValueError(f"{folder} holds study {header.get('study')}, not {NAME}")
    config = {**header["config"], "problem": problems.get(header["problem"])}
    return training.Settings(**config)


@contextmanager
def _sigterm() -> Iterator[Event]:
    """Context in which SIGTERM only sets the event; without effect outside the main thread."""
    asked = Event()
    if current_thread() is not main_thread():  # nobody may be told there
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


def _epochs(
    settings: training.Settings,
    folder: Path,
    resume: Path | None,
    progress: Progress,
    asked: Event,
) -> Iterator[training.TrainingState]:
    """States at the start and after each epoch.

    Raises: Stopped if the event is set, when the checkpoint is written.
    """
    task = progress.add_task(f"training {settings.optimizer}", total=None)
    for state in training.steps(settings, resume / CHECKPOINT if resume else None):
        total = settings.epochs * state.steps_per_epoch
        progress.update(task, total=total, completed=state.step)
        if state.step % state.steps_per_epoch == 0:
            yield state
        if asked.is_set() and state.step < total:
            checkpoints.save(state, folder / CHECKPOINT)
            raise Stopped(f"by SIGTERM at step {state.step:,} of {total:,}; --resume goes on")


def _last_step(folder: Path) -> int:
    frame = records.read(folder)
    return -1 if frame.empty else int(frame["step"].max())


def _rows(
    folder: Path,
    settings: training.Settings,
    state: training.TrainingState,
    during: DuringTraining | None,
    losses: dict[str, float],
) -> list[dict[str, Any]]:
    own = {"run": folder.name, "study": NAME}
    measured = [] if during is None or state.step == 0 else during.rows(settings, state, losses)
    if measured:
        return [{**own, **row} for row in measured]
    shared = {**own, **training.place(settings, state)}
    return [{**shared, **loss_row(name, value)} for name, value in losses.items()]


def table(frame: pd.DataFrame) -> Table:
    """Losses by epoch, and accuracies of classifiers, as a table."""
    frame = frame[frame["block"] == ""]
    wide = frame.pivot_table(index=["epoch", "seconds"], columns="metric", values="value")
    names = sorted(wide.columns, key=lambda name: (not name.endswith("_loss"), "test" in name))
    rows = [
        [f"{row['epoch']:g}", f"{row['seconds']:.1f}", *(f"{row[name]:.4f}" for name in names)]
        for row in wide.reset_index().to_dict("records")
    ]
    return Table("", ("epoch", "seconds", *(name.replace("_", " ") for name in names)), rows)
