"""Bench: share of a training step that is spent on loading the batch.

Loading is to choose a batch's examples, to copy them out of the set, which is in memory, and to
augment them; a step all that `training.steps` counts, loading included, of SGD with momentum, whose
steps are the cheapest. Problems of the papers' size on their own data, as far as they lie here:
nothing is downloaded. Before each step its batch is loaded once more, timed, and thrown away.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import rich.table
from rich.markup import escape

from .. import data, problems, training
from ..problems import TrainingProblem
from ..results.tables import Table
from .step import YARDSTICK, threads

NAMES = ("mnist-autoencoder", "fashion-cnn", "cifar10-subset-cnn", "cifar10-resnet32")
STEPS, BEFORE = 40, 3  # those that are timed, those before them
DOMINATES = 0.5  # of a step


@dataclass(frozen=True)
class LoadingCost:
    """Median seconds to load a batch and to do a whole step."""

    name: str
    batch: int
    loading: float
    step: float

    @property
    def share(self) -> float:
        """Of the step that is loading."""
        return self.loading / self.step


def loading() -> rich.table.Table:
    """Loading of every problem whose data are on this machine, float32, two threads."""
    with threads(2):
        return compared(chosen())


def chosen() -> list[TrainingProblem]:
    """The problems, and one of them augmented as the papers' networks on CIFAR-10 are."""
    found = [problems.get(name) for name in NAMES]
    plain, whole = found[-2:]
    name = f"{plain.name}, augmented"
    return [*found[:-1], dataclasses.replace(plain, name=name, augment=whole.augment), whole]


def compared(wanted: Sequence[TrainingProblem], steps: int = STEPS) -> rich.table.Table:
    """Time the problems, a row each; the caption names those that could not be timed."""
    costs, left_out = [], []
    for problem in wanted:
        try:
            with data.without_downloads():
                held = _held(problem.data())
        except (FileNotFoundError, ValueError) as error:
            left_out.append(escape(f"not timed: {problem.name}: {error}"))
            continue
        costs.append(measured(dataclasses.replace(problem, data=held), steps))
    return _table(costs, left_out)


def _held(found: data.Data) -> Callable[[], data.Data]:
    return lambda: found


def measured(problem: TrainingProblem, steps: int = STEPS) -> LoadingCost:
    """Time the loading of each batch, and the step that loads and uses it."""
    settings = training.Settings(problem, YARDSTICK, training.FOREVER)
    loads: list[float] = []
    wholes: list[float] = []
    done = 0.0
    for state in training.steps(settings):
        wholes.append(state.seconds - done)  # of the step that has just ended
        done = state.seconds
        if state.step == BEFORE + steps:
            break
        begun = time.perf_counter()
        training.batch(state, settings)
        loads.append(time.perf_counter() - begun)
    load, whole = statistics.median(loads[BEFORE:]), statistics.median(wholes[BEFORE + 1 :])
    return LoadingCost(problem.name, state.batch, load, whole)


def _table(costs: Sequence[LoadingCost], left_out: Sequence[str]) -> rich.table.Table:
    title = f"loading a batch, {YARDSTICK} with momentum, float32, two threads"
    columns, rows = ("problem", "batch", "loading, ms", "step, ms", "share", "target"), []
    for cost in costs:
        numbers = (f"{1e3 * cost.loading:.2f}", f"{1e3 * cost.step:.1f}", f"{cost.share:.1%}")
        rows.append([cost.name, str(cost.batch), *numbers, f"< {DOMINATES:.0%}"])
    about = "share: of the step's time; loading includes cropping and mirroring"
    return Table("\n".join([about, *left_out]), columns, rows).for_terminal(title)
