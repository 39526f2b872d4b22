"""Does block-diagonal Hessian-free do in large batches what its paper says?

Four claims of Zhang et al. 2017 (arXiv:1712.07296): with large batches it gets as far as Adam with
small ones, in about ten times fewer updates; it does at least as well as plain Hessian-free at
several curvature batch sizes, in training and in test; an update costs as much as plain
Hessian-free's, and several times Adam's; and Adam's loss rises late in large batches.

Large is the problem's batch, small a tenth of it, so that equal epochs are ten times the updates.
Settings are fixed for a run and tuned by training loss: each optimizer's learning rate and damping,
Adam's learning rate for each batch size, Hessian-free's with a quarter of the batch for curvature.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .. import problems
from ..results.runs import running
from ..training import trials
from ..training.trials import Trial
from ..tuning.grids import candidates
from . import _hessian_free_claims

NAME = "block_hessian_free"
KINDS = {"hessian_free": "HF", "block_hessian_free": "block HF"}
SHARES = (8, 4, 2)  # the curvature batch is the batch over this
TUNED_AT = 4


@dataclass(frozen=True)
class Grid:
    """What the study runs over; fields as in `optimizers_compared.Grid`.

    lr_factors, damping_factors: of both Hessian-free. adam_lr_factors: of Adam, an epoch of which
    costs a small part of one of theirs.
    """

    problem: str = "mnist-autoencoder-tanh-small"
    seed: int = 0
    seeds: int = 3
    epochs: int = 0
    lr_factors: Sequence[float] = (0.3, 1.0, 3.0)
    damping_factors: Sequence[float] = (0.1, 1.0, 10.0)
    adam_lr_factors: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0)
    workers: int = 2
    device: str = "cpu"

    @property
    def budget(self) -> int:
        """Epochs of every run."""
        return self.epochs or problems.get(self.problem).epochs

    @property
    def large(self) -> int:
        """Examples in a large batch."""
        return problems.get(self.problem).batch_size

    @property
    def small(self) -> int:
        """Examples in a small one."""
        return max(1, self.large // 10)


TINY = Grid(seeds=1, epochs=1, lr_factors=(1.0,), damping_factors=(1.0,), adam_lr_factors=(1.0,))


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; each training is written when it has ended.

    resume: as in `runs.running`; trainings that are there are kept.
    """
    with running(NAME, vars(grid), __doc__, results, resume) as (folder, header):
        tuned = tune(grid, folder, progress)
        finals = train_best(grid, folder, tuned, progress)
        judge(grid, folder, finals, header)
    return folder


def contenders(grid: Grid) -> dict[str, list[Trial]]:
    """The trials that each optimizer is tuned by, by name of its run."""
    found = {}
    adam = dataclasses.replace(grid, lr_factors=grid.adam_lr_factors)
    for size in (grid.small, grid.large):
        found[f"Adam, batch {size}"] = _points(adam, "adam", {}, size)
    for optimizer, short in KINDS.items():
        curvature = {"curvature_batch": _curvature(grid, TUNED_AT)}
        found[short] = _points(grid, optimizer, curvature, grid.large)
    return found


def _points(grid: Grid, optimizer: str, fixed: dict[str, Any], batch: int) -> list[Trial]:
    factors = grid.lr_factors, grid.damping_factors
    points = candidates(grid.problem, optimizer, *factors, grid.seed, grid.budget, grid.device)
    return [
        dataclasses.replace(
            point,
            settings=tuple(sorted({**dict(point.settings), **fixed}.items())),
            batch_size=batch,
        )
        for point in points
    ]


def _curvature(grid: Grid, share: int) -> int:
    return -(-grid.large // share)


def tune(grid: Grid, folder: Path, progress: Progress) -> dict[str, Trial]:
    """Train all candidates and return the best of each run."""
    own = contenders(grid)
    trials.complete_all(folder, itertools.chain(*own.values()), grid.workers, "tuning", progress)
    return {name: trials.best(folder, found) for name, found in own.items()}


def train_best(
    grid: Grid, folder: Path, tuned: dict[str, Trial], progress: Progress
) -> dict[str, list[Trial]]:
    """Train the best settings with every seed and curvature batch; losses go into the records."""
    best: dict[str, Trial] = {}
    for name, trial in tuned.items():
        if name.startswith("Adam"):
            best[name] = trial
            continue
        for share in SHARES:
            size = _curvature(grid, share)
            settings = {**dict(trial.settings), "curvature_batch": size}
            best[f"{name}, curvature {size}"] = dataclasses.replace(
                trial, settings=tuple(sorted(settings.items()))
            )
    seeds = range(grid.seed, grid.seed + grid.seeds)
    finals = {n: [dataclasses.replace(t, seed=s) for s in seeds] for n, t in best.items()}
    wanted = itertools.chain(*finals.values())
    trials.complete_all(folder, wanted, grid.workers, "best settings", progress)
    for name, own in finals.items():
        trials.record(folder, name.replace(", ", "-").replace(" ", "-"), NAME, {name: own})
    return finals


def judge(grid: Grid, folder: Path, finals: dict[str, list[Trial]], header: dict[str, Any]) -> None:
    """Put the table and the verdict on each claim into the header."""
    runs = trials.read_all(folder, finals)
    settings = {name: _in_print(own[0]) for name, own in finals.items()}
    header["comparison"] = _hessian_free_claims.table(runs, settings, grid.budget).as_header()
    plain, block = KINDS.values()
    sizes = [_curvature(grid, share) for share in SHARES]
    pairs = {n: (runs[f"{plain}, curvature {n}"], runs[f"{block}, curvature {n}"]) for n in sizes}
    small, large = (runs[f"Adam, batch {size}"] for size in (grid.small, grid.large))
    header["claims"] = [
        _hessian_free_claims.fewer_updates(small, pairs[_curvature(grid, TUNED_AT)][1]),
        _hessian_free_claims.not_worse_than_plain(pairs),
        _hessian_free_claims.costs(large, pairs),
        _hessian_free_claims.late_rise(large),
    ]


def _in_print(trial: Trial) -> str:
    values = dict(trial.settings)
    shown = {"lr": "lr", "damping": "λ"}
    return ", ".join(f"{short} {values[name]:g}" for name, short in shown.items() if name in values)
