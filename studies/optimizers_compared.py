"""How fast does each optimizer train, by epochs and by seconds, at its own best settings?

Each is tuned over a grid of learning rates and dampings around the problem's recommended ones: the
training loss at the end of the budget decides. Then its best setting is trained with every seed.
The yardstick is SGD with momentum at every learning rate of its grid, which is given several times
the epochs: how many steps does it need, from the same start, to get as far as the method got?
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from studies import comparison, problems, records, trials
from studies.optimizers import ONE_SOLVE_A_STEP, OPTIMIZERS
from studies.running import running
from studies.trials import Trial

NAME = "optimizers_compared"
YARDSTICK = "sgd"


@dataclass(frozen=True)
class Grid:
    """What the study runs over.

    lr_factors, damping_factors: times the problem's recommended values, where it has one; a
    kl_clip takes the squares of the lr's factors, and the lr then stays. seed: of the tuning; the
    final runs have this and the following ones, `seeds` of them. longer: the yardstick's budget
    in units of `epochs`.
    """

    problem: str = "digits-autoencoder"
    optimizers: Sequence[str] = field(default_factory=lambda: ONE_SOLVE_A_STEP)
    seed: int = 0
    seeds: int = 1
    epochs: int = 0  # 0: the problem's
    longer: int = 6
    lr_factors: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0)
    damping_factors: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0)
    workers: int = 2

    @property
    def budget(self) -> int:
        """Epochs of the tuning and of the final runs."""
        return self.epochs or problems.get(self.problem).epochs


TINY = Grid(
    "digits-autoencoder-small",
    ("kfac", "adam"),
    epochs=2,
    longer=3,
    lr_factors=(0.3, 1.0),
    damping_factors=(1.0,),
)


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; every training is written when it has ended.

    resume: the folder of an earlier run on the same problem; what it has trained is kept.
    A training that diverges, or whose factors cannot be inverted, counts as infinitely bad.
    Raises: ValueError for a folder of another study or problem.
    """
    question = (__doc__ or "").partition("\n")[0]
    with running(NAME, dataclasses.asdict(grid), question, results, resume) as (folder, header):
        tuned = tune(grid, folder, progress)
        finals = train_best(grid, folder, tuned, progress)
        header["comparison"] = compared(grid, folder, tuned, finals)
    return folder


def candidates(grid: Grid, optimizer: str) -> list[Trial]:
    """The trials that an optimizer is tuned by, one per point of its grid."""
    own = axes(grid.problem, optimizer, grid.lr_factors, grid.damping_factors)
    points = [dict(zip(own, point, strict=True)) for point in itertools.product(*own.values())]
    return [trials.trial(grid.problem, optimizer, p, grid.seed, grid.budget) for p in points]


def axes(
    problem: str, optimizer: str, lr_factors: Sequence[float], damping_factors: Sequence[float]
) -> dict[str, list[float]]:
    """What is tuned: {setting: the recommended value times the factors}, where there is one.

    Raises: ValueError for an unknown problem or optimizer.
    """
    recommended = problems.get(problem).optimizers.get(optimizer, {})
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{optimizer}'; known: {sorted(OPTIMIZERS)}")
    factors = {"lr": lr_factors, "damping": damping_factors}
    if "kl_clip" in recommended:  # clipped steps have a length of its root, whatever the lr
        factors = {"kl_clip": [f**2 for f in lr_factors], "damping": damping_factors}
    return {
        name: [float(f"{recommended[name] * factor:.2g}") for factor in factors[name]]
        for name in factors
        if name in recommended
    }


def yardsticks(grid: Grid) -> list[list[Trial]]:
    """For each seed SGD with momentum at every learning rate, with its longer budget."""
    own, long = candidates(grid, YARDSTICK), grid.budget * grid.longer
    return [
        [dataclasses.replace(trial, seed=seed, epochs=long) for trial in own]
        for seed in range(grid.seed, grid.seed + grid.seeds)
    ]


def tune(grid: Grid, folder: Path, progress: Progress) -> dict[str, Trial]:
    """Train all candidates and the yardsticks; {optimizer: the best of its candidates}."""
    own = {name: candidates(grid, name) for name in grid.optimizers}
    wanted = itertools.chain(*own.values(), *yardsticks(grid))
    trials.complete_all(folder, wanted, grid.workers, "tuning", progress)
    losses = {name: [trials.loss_at_the_end(folder, t) for t in own[name]] for name in own}
    return {name: own[name][int(np.argmin(losses[name]))] for name in own}


def train_best(
    grid: Grid, folder: Path, tuned: dict[str, Trial], progress: Progress
) -> dict[str, list[Trial]]:
    """Train each best candidate with every seed and put its losses into the records."""
    seeds = range(grid.seed, grid.seed + grid.seeds)
    finals = {
        name: [dataclasses.replace(trial, seed=seed) for seed in seeds]
        for name, trial in tuned.items()
    }
    wanted = itertools.chain(*finals.values())
    trials.complete_all(folder, wanted, grid.workers, "best settings", progress)
    for name, own in finals.items():
        records.put(folder, name, [row for t in own for row in trials.rows(folder, t, NAME, name)])
    return finals


def compared(
    grid: Grid, folder: Path, tuned: dict[str, Trial], finals: dict[str, list[Trial]]
) -> dict[str, Any]:
    """The study's table, in print: {"caption", "columns", "rows"}."""
    paces = [[trials.read(folder, trial) for trial in own] for own in yardsticks(grid)]
    rows = [
        comparison.row(
            name,
            comparison.settings(tuned[name].settings, [t.settings for t in candidates(grid, name)]),
            [trials.read(folder, trial) for trial in own],
            grid.budget,
            paces,
        )
        for name, own in finals.items()
    ]
    return comparison.table(rows, grid.budget, grid.seeds, grid.longer)
