"""Single training runs and single measurements, for the command line."""

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pandas as pd
import torch
from rich.progress import Progress
from rich.table import Table

from diag import Problem
from studies import measuring, problems, provenance, records, training
from studies.alongside import Alongside
from studies.snapshots import loss_row

NAME = "train"
CHECKPOINT = "checkpoint.pt"
LAST_FINITE = "last-finite.pt"


@dataclass(frozen=True)
class Outcome:
    """Where a training run is kept, its records, and why it ended early if it did.

    measuring: what measuring beside it took, in words. stopped: by SIGTERM, at a checkpoint from
    which it can go on.
    """

    folder: Path
    frame: pd.DataFrame
    diverged: str = ""
    stopped: bool = False
    measuring: str = ""


class Stopped(Exception):
    """SIGTERM has come, and the checkpoint of this step is written."""


def train(
    settings: training.Settings,
    results: Path,
    progress: Progress,
    resume: Path | None = None,
    beside: Alongside | None = None,
) -> Outcome:
    """Train, writing losses and a checkpoint after every epoch; evaluation time is not counted.

    resume: the folder of an earlier run of the same settings, which then goes on in place.
    beside: measures at ends of epochs; what it spent goes into the header.
    A run that diverges keeps its records; the last parameters with a finite loss are in
    last-finite.pt and the header's status says so. SIGTERM ends the run after the step under way,
    with a checkpoint of that.
    """
    folder = resume or records.new_run(results, NAME)
    header = records.read_header(folder) if resume else _header(settings)
    if beside is not None:
        header["metrics"] = measuring.definitions([*beside.plan.metrics, "noise_floor"])
        beside.resume(header.get("measuring", {}))
    records.write_header(folder, header | {"status": "running"})
    status, diverged, begun = "finished", "", time.perf_counter()
    try:
        with _sigterm() as asked:
            for state in _epochs(settings, folder, resume, progress, asked):
                if not (resume and state.step == _last_step(folder)):
                    records.append(folder, _rows(folder, settings, state, beside))
                    if beside is not None:
                        header["measuring"] = beside.counters()
                training.save(state, folder / CHECKPOINT)
    except Stopped as reason:
        status = f"stopped: {reason}"
    except training.DivergedError as error:
        diverged = str(error)
        status = f"diverged: {diverged}"
        training.save_parameters(error.parameters, folder / LAST_FINITE)
    except BaseException as error:
        records.write_header(folder, header | {"status": f"failed: {type(error).__name__}"})
        raise
    seconds = header["seconds"] + time.perf_counter() - begun
    records.write_header(folder, header | {"status": status, "seconds": seconds})
    frame = records.read(folder)
    said = "" if beside is None else beside.summary(frame["seconds"].max())
    return Outcome(folder, frame, diverged, status.startswith("stopped"), said)


def _header(settings: training.Settings) -> dict[str, Any]:
    config = dataclasses.asdict(dataclasses.replace(settings, problem=None))  # type: ignore[arg-type]
    return provenance.header(NAME, settings.problem.name, settings.device, config)


@contextmanager
def _sigterm() -> Iterator[Event]:
    """Inside, SIGTERM sets the event and nothing else, where Python may handle signals."""
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
) -> Iterator[training.State]:
    """The states at the ends of epochs, the start included.

    Raises: Stopped if the event is set, when the checkpoint is written.
    """
    task = progress.add_task(f"training {settings.optimizer}", total=None)
    for state in training.steps(settings, resume / CHECKPOINT if resume else None):
        total = settings.epochs * state.steps_per_epoch
        progress.update(task, total=total, completed=state.step)
        if state.step % state.steps_per_epoch == 0:
            yield state
        if asked.is_set() and state.step < total:
            training.save(state, folder / CHECKPOINT)
            raise Stopped(f"by SIGTERM at step {state.step:,} of {total:,}; --resume goes on")


def _last_step(folder: Path) -> int:
    frame = records.read(folder)
    return -1 if frame.empty else int(frame["step"].max())


def _rows(
    folder: Path, settings: training.Settings, state: training.State, beside: Alongside | None
) -> list[dict[str, Any]]:
    own = {"run": folder.name, "study": NAME}
    measured = [] if beside is None or state.step == 0 else beside.rows(settings, state)
    if measured:
        return [{**own, **row} for row in measured]
    shared = {
        **own,
        "problem": settings.problem.name,
        "optimizer": settings.optimizer,
        "seed": settings.seed,
        "step": state.step,
        "epoch": state.epoch,
        "seconds": state.seconds,
    }
    losses = training.evaluate(state, settings.problem)
    return [{**shared, **loss_row(name, value)} for name, value in losses.items()]


def table(frame: pd.DataFrame) -> Table:
    """Losses, and accuracies where there are classes, by epoch as a table."""
    frame = frame[frame["block"] == ""]
    wide = frame.pivot_table(index=["epoch", "seconds"], columns="metric", values="value")
    names = sorted(wide.columns, key=lambda name: (not name.endswith("_loss"), "test" in name))
    shown = Table("epoch", "seconds", *(name.replace("_", " ") for name in names))
    for row in wide.reset_index().to_dict("records"):
        numbers = [f"{row[name]:.4f}" for name in names]
        shown.add_row(f"{row['epoch']:g}", f"{row['seconds']:.1f}", *numbers)
    return shown


def measure_table(
    problem: str, block: str, truth: str, examples: int, checkpoint: Path | None, seed: int
) -> Table:
    """Measure a problem's blocks at its initial or checkpointed parameters.

    Raises: ValueError for an unknown problem, block, truth or checkpoint.
    """
    setting = problems.get(problem)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = setting.model()
    if checkpoint is not None:
        if not checkpoint.is_file():
            raise ValueError(f"no checkpoint {checkpoint}; `kronscope train` writes one")
        model.load_state_dict(torch.load(checkpoint, weights_only=True)["model"])
    data = setting.data()
    inputs, targets = data.train_inputs[:examples], data.train_targets[:examples]
    found = Problem(model, setting.loss, inputs, targets, dtype=torch.float64)
    plan = measuring.Plan(truths=(truth,), damping=setting.measure_damping)
    blocks = [found.block(block)] if block else found.blocks()
    shown = Table("block", "d", "approximation", "metric", "value", "95 % interval", title=truth)
    for row in measuring.measure(found, plan, {}, blocks):
        interval = "" if math.isnan(row["low"]) else f"{row['low']:.4g} … {row['high']:.4g}"
        name = row["approximation"] or "exact"
        place = (row["block"], f"{row['size']:,}", name, row["metric"])
        shown.add_row(*place, f"{row['value']:.4g}", interval)
    return shown
