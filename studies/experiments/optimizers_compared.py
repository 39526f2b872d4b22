"""How fast does each optimizer train, by epochs and by seconds, at its own best settings?

Each is tuned over a grid of learning rates and dampings around the problem's recommended ones: the
training loss at the end of the tuning's budget decides. Then its best setting is trained with every
seed. The yardstick is SGD with momentum at every learning rate of its grid, which is given several
times the epochs: how many steps does it need, from the same start, to get as far as the method got?
Where training curves of the problem were published, they stand beside ours.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from .. import problems
from ..problems import _hyper
from ..reports import comparison_tables
from ..results import records
from ..results.runs import running
from ..results.tables import Table
from ..training import trials
from ..training.optimizers import ONE_SOLVE_A_STEP
from ..training.trials import Trial
from ..tuning import grids
from . import _published

NAME = "optimizers_compared"
YARDSTICK = "sgd"


@dataclass(frozen=True)
class Grid:
    """Settings of the study.

    lr_factors, damping_factors: times the problem's recommended values, where it has one; a
    kl_clip takes the squares of the lr's factors, and the lr then stays. seed: of the tuning; the
    final runs have this and the following ones, `seeds` of them, and up to `spares` more in place
    of those that diverge. epochs: of a final run; with 0 each optimizer has those of its schedule
    on the problem, or the problem's. tune_epochs: of the tuning's; with 0 as many. longer: the
    yardstick's budget in units of its epochs; one with a schedule ends with that, after which it
    would hardly move.
    """

    problem: str = "digits-autoencoder"
    optimizers: Sequence[str] = field(default_factory=lambda: ONE_SOLVE_A_STEP)
    seed: int = 0
    seeds: int = 1
    spares: int = 0
    epochs: int = 0
    tune_epochs: int = 0
    longer: int = 6
    lr_factors: Sequence[float] = _hyper.LR_FACTORS
    damping_factors: Sequence[float] = _hyper.DAMPING_FACTORS
    workers: int = 2
    device: str = "cpu"

    def budget(self, optimizer: str) -> int:
        """Epochs of the final runs."""
        return self.epochs or problems.get(self.problem).epochs_of(optimizer)

    def trial_budget(self, optimizer: str) -> int:
        """Epochs of the tuning."""
        return self.tune_epochs or self.budget(optimizer)

    @property
    def patience(self) -> int:
        """How many times its budget SGD-momentum is trained for."""
        scheduled = YARDSTICK in problems.get(self.problem).schedule
        return 1 if scheduled and not self.epochs else self.longer


TINY = Grid(
    "digits-autoencoder-small",
    ("kfac", "adam"),
    epochs=2,
    longer=3,
    lr_factors=(0.3, 1.0),
    damping_factors=(1.0,),
)


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; each training is written when it has ended.

    resume: as in `runs.running`; trainings that are there are kept.
    A training that diverges, or whose factors cannot be inverted, counts as infinitely bad.
    """
    with running(NAME, vars(grid), __doc__, results, resume) as (folder, header):
        tuned = tune(grid, folder, progress)
        finals = train_best(grid, folder, tuned, progress)
        header["comparison"] = compared(grid, folder, tuned, finals, progress).as_header()
        add_published(grid, folder, finals, header)
    return folder


def candidates(grid: Grid, optimizer: str) -> list[Trial]:
    """The trials that an optimizer is tuned by, one per point of its grid."""
    factors, epochs = (grid.lr_factors, grid.damping_factors), grid.trial_budget(optimizer)
    return grids.candidates(grid.problem, optimizer, *factors, grid.seed, epochs, grid.device)


def yardsticks(grid: Grid, seeds: Iterable[int]) -> list[list[Trial]]:
    """Trials of SGD-momentum at every learning rate, for each seed, with the longer budget."""
    own, long = candidates(grid, YARDSTICK), grid.budget(YARDSTICK) * grid.patience
    return [[dataclasses.replace(trial, seed=seed, epochs=long) for trial in own] for seed in seeds]


def tune(grid: Grid, folder: Path, progress: Progress) -> dict[str, Trial]:
    """Train all candidates and return each optimizer's best; a single one is not trained."""
    own = {name: candidates(grid, name) for name in grid.optimizers}
    several = itertools.chain(*(found for found in own.values() if len(found) > 1))
    trials.complete_all(folder, several, grid.workers, "tuning", progress)
    return {name: trials.best(folder, found) for name, found in own.items()}


@dataclass(frozen=True)
class Finals:
    """An optimizer's final runs, and how many seeds were tried to get them."""

    trials: list[Trial]
    tried: int


def train_best(
    grid: Grid, folder: Path, tuned: dict[str, Trial], progress: Progress
) -> dict[str, Finals]:
    """Train each best candidate with every seed and put its losses into the records.

    Spares come in as long as fewer than `seeds` converged; what diverged counts only where there
    are not enough others.
    """
    own = {name: [_of(grid, trial, k) for k in range(grid.seeds)] for name, trial in tuned.items()}
    while True:
        wanted = itertools.chain(*own.values())
        trials.complete_all(folder, wanted, grid.workers, "best settings", progress)
        lacking = {name: grid.seeds - len(_converged(folder, found)) for name, found in own.items()}
        room = {name: grid.seeds + grid.spares - len(found) for name, found in own.items()}
        more = {name: min(lacking[name], room[name]) for name in own}
        if not any(more.values()):
            break
        for name, found in own.items():
            tried = len(found)
            found += [_of(grid, tuned[name], tried + k) for k in range(more[name])]
    finals = {}
    for name, found in own.items():
        shown = sorted(found, key=lambda trial: trial not in _converged(folder, found))
        finals[name] = Finals(sorted(shown[: grid.seeds], key=lambda t: t.seed), len(found))
        trials.record(folder, name, NAME, {name: finals[name].trials})
    return finals


def _of(grid: Grid, trial: Trial, place: int) -> Trial:
    epochs = grid.budget(trial.optimizer)
    return dataclasses.replace(trial, seed=grid.seed + place, epochs=epochs)


def _converged(folder: Path, found: Iterable[Trial]) -> list[Trial]:
    return [trial for trial in found if np.isfinite(trials.loss_at_the_end(folder, trial))]


def compared(
    grid: Grid,
    folder: Path,
    tuned: dict[str, Trial],
    finals: dict[str, Finals],
    progress: Progress,
) -> Table:
    """Train the yardsticks and return the comparison table."""
    seeds = sorted({trial.seed for own in finals.values() for trial in own.trials})
    paces = dict(zip(seeds, yardsticks(grid, seeds), strict=True))
    wanted = itertools.chain(*paces.values())
    trials.complete_all(folder, wanted, grid.workers, "SGD with momentum", progress)
    rows = [
        comparison_tables.row(
            name,
            comparison_tables.settings(
                tuned[name].settings, [t.settings for t in candidates(grid, name)]
            ),
            [trials.read(folder, trial) for trial in own.trials],
            grid.budget(name),
            [[trials.read(folder, pace) for pace in paces[t.seed]] for t in own.trials],
            own.tried,
        )
        for name, own in finals.items()
    ]
    return comparison_tables.table(rows, _in_print(grid), grid.seeds, grid.patience)


def _in_print(grid: Grid) -> str:
    """Epochs of the runs and of the tuning, as text.

    What follows it is "at the settings that were best for one seed".
    """
    tuning = f", tuned by {grid.tune_epochs}," if grid.tune_epochs else ""
    budgets = {name: grid.budget(name) for name in grid.optimizers}
    if len(set(budgets.values())) == 1:
        return f"{next(iter(budgets.values()))} epochs{tuning}"
    own = ", ".join(f"{budgets[name]} ({name})" for name in sorted(budgets))
    return f"{own} epochs{tuning}"


def add_published(
    grid: Grid, folder: Path, finals: dict[str, Finals], header: dict[str, Any]
) -> None:
    """Add published curves to the records and the table that compares them to the header.

    The step of a published point is that of ours after as many epochs.
    """
    known = [name for name in finals if name in _published.curves(grid.problem)]
    if not known:
        return
    shared = {"run": folder.name, "study": NAME, "problem": grid.problem}
    setting = problems.get(grid.problem)
    per_epoch = len(setting.data().train_inputs) // setting.batch_size
    for name in known:
        found = _published.rows(shared, name, per_epoch, grid.budget(name))
        records.put(folder, f"{name}-published", found)
    runs = trials.read_all(folder, {n: _converged(folder, finals[n].trials) for n in known})
    last = max(grid.budget(name) for name in known)
    header["published"] = _published.table(grid.problem, runs, last).as_header()
