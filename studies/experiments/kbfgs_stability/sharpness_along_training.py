"""How close to instability does an optimizer train, and can that be seen before it diverges?

Before each step the greatest eigenvalue of lr P H is found by products alone (`diag.spectra`),
with P the optimizer's preconditioner and H the exact Hessian or GGN of some training examples: of
the whole model, and now and then layer by layer, with what each factor and pair of a layer is worth
(`layer_health`) and how much of the possible decrease a step takes. Beside it stand the
loss of the coming batch and, of an optimizer that computes it anyway, the curvature ratio of the
last step. Then a threshold on each is chosen on half of the seeds and judged on the others.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from kronscope import optim
from kronscope.diag.spectra import stability_limit

from ... import problems, training
from ...reports import prediction
from ...results import records
from ...results.records import loss_row
from ...results.runs import running
from ...training import optimizers
from ...training.optimizers import HESSIAN_FREE, OPTIMIZERS, WRAPPED
from ...training.workers import results_of
from . import edge_of_stability, layer_health
from .edge_of_stability import Searches, observe
from .layer_health import Pairs

NAME = "sharpness_along_training"
FIXED = "steps", "examples", "layers_every"
# trained as kbfgs_limited without a limit: the same steps, and the curvature ratio is measured
WATCHED: dict[str, dict[str, Any]] = {"kbfgs": {}, "kbfgs_l": {"history": 100}}


@dataclass(frozen=True)
class Grid:
    """Settings of the study.

    steps: of every training. layers_every: steps between measurements layer by layer and of the
    step's efficiency, 0 for none.
    examples: the first so many of the training set, for the curvature.
    """

    problem: str = "mnist-autoencoder"
    optimizers: Sequence[str] = ("kbfgs",)
    seed: int = 0
    seeds: int = 40
    steps: int = 60
    layers_every: int = 0
    examples: int = 500
    workers: int = 2


TINY = Grid(
    "digits-autoencoder-small", ("kbfgs", "kfac"), seeds=2, steps=4, layers_every=2, examples=32
)


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; every training is written when it has ended.

    resume: the folder of an earlier run on the same problem; trainings that are there are kept.
    Raises: ValueError for a folder of another study or problem or of other `FIXED` settings, or an
    optimizer without a preconditioner to be shown.
    """
    limits = {name: limit(grid.problem, name) for name in grid.optimizers}
    with running(NAME, vars(grid), __doc__, results, resume, FIXED) as (
        folder,
        header,
    ):
        seeds = range(grid.seed, grid.seed + grid.seeds)
        wanted = list(itertools.product(grid.optimizers, seeds))
        missing = [place for place in wanted if not _path(folder, *place).is_file()]
        task = progress.add_task(
            "training", total=len(wanted), completed=len(wanted) - len(missing)
        )
        jobs = [(grid, *place) for place in missing]
        for (_, optimizer, seed), (rows, ended) in results_of(trace, jobs, grid.workers):
            if ended:
                progress.console.print(f"{optimizer}, seed {seed} ended: {ended}")
            content = records.frame_of(_complete(folder, grid, rows))
            records.write_atomically(
                _path(folder, optimizer, seed), content.to_parquet(index=False)
            )
            progress.advance(task)
        header["comparison"] = prediction.table(records.read(folder)).as_header()
        header["stable_below"] = limits
    return folder


def limit(problem: str, optimizer: str) -> float:
    """Largest sharpness that is stable on a quadratic at the recommended momentum.

    Raises: ValueError for an unknown optimizer, or one that shows no preconditioner.

    >>> round(limit("mnist-autoencoder", "kbfgs"), 6), round(limit("mnist-autoencoder", "tnt"), 6)
    (38.0, 3.8)
    """
    made = optimizers.make(optimizer, torch.nn.Linear(1, 1), problems.get(problem), {})
    if not isinstance(made, optim.CurvatureOptimizer):
        known = sorted(set(OPTIMIZERS) - {"adam", "sgd", *HESSIAN_FREE, *WRAPPED})
        raise ValueError(f"'{optimizer}' shows no preconditioner; these do: {known}")
    momentum = made.param_groups[0].get("momentum", 0.0)
    return stability_limit(momentum) * (1 - momentum if made.heavy_ball else 1.0)


def _path(folder: Path, optimizer: str, seed: int) -> Path:
    return folder / "records" / f"part-{optimizer}-{seed}.parquet"


def _complete(folder: Path, grid: Grid, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    shared = {"run": folder.name, "study": NAME, "problem": grid.problem}
    return ({**shared, **row} for row in rows)


def trace(grid: Grid, optimizer: str, seed: int) -> tuple[list[dict[str, Any]], str]:
    """Train with one thread and measure before every step; rows without run, study and problem.

    batch_loss is that of the coming step. It ends where that has gone wrong (`prediction.WRONG`),
    or was infinite because the optimizer gave up; the second value is what it said then.
    """
    torch.set_num_threads(1)
    problem = problems.get(grid.problem)
    name, hyper = optimizer, dict[str, Any]()
    if optimizer in WATCHED:
        own = WATCHED[optimizer] | dict(problem.optimizers.get(optimizer, {}))
        name, hyper = "kbfgs_limited", own | {"curvature_limit": math.inf}
    settings = training.Settings(problem, name, training.FOREVER, seed, hyper=hyper)
    measuring, states = _Measuring(grid, settings), training.steps(settings)
    rows: list[dict[str, Any]] = []
    place: dict[str, Any] = {"optimizer": optimizer, "seed": seed}
    while True:
        try:
            state = next(states)
        except training.NUMERICAL_ERRORS as error:
            if "step" not in place:
                raise
            place["step"] += 1
            return [*rows, {**place, **loss_row("batch_loss", np.inf)}], str(error)
        place |= {"step": state.step, "epoch": state.epoch, "seconds": state.seconds}
        found, wrong = measuring.at(state)
        rows += [{**place, **row} for row in found]
        if wrong or state.step == grid.steps - 1:
            return rows, ""


class _Measuring:
    """Measurements before each step, warm-started from the last ones."""

    def __init__(self, grid: Grid, settings: training.Settings) -> None:
        self.grid, self.settings = grid, settings
        self.searches = Searches()
        self.pairs: Pairs | None = None
        self.first = np.nan

    def at(self, state: training.TrainingState) -> tuple[list[dict[str, Any]], bool]:
        """Rows of this step, and whether the next batch's loss has gone wrong."""
        loss = training.batch_loss(state, self.settings)
        self.first = self.first if state.step else loss
        found = [loss_row("batch_loss", loss)]
        ratio = getattr(state.optimizer, "curvature_ratio", None)
        if ratio is not None:
            found.append(loss_row("curvature_ratio", float(ratio)))
        wrong = not loss <= prediction.WRONG * self.first
        if state.step and not wrong:
            found += self.rows(state)
        return found, wrong

    def rows(self, state: training.TrainingState) -> list[dict[str, Any]]:
        """Rows of the sharpness and, every `layers_every` steps, of the layers."""
        group = state.optimizer.param_groups[0]
        if self.pairs is None:
            own = group.get("pair_decay")
            self.pairs = Pairs(group.get("decay", 0.0) if own is None else own)
        view = observe(state, self.settings, self.grid.examples)
        self.pairs.look(view.states)
        found = [edge_of_stability.of_the_whole(view, group["lr"], self.searches)]
        if self.grid.layers_every and state.step % self.grid.layers_every == 0:
            moments = layer_health.moments(view)
            found += [
                edge_of_stability.by_layer(view, group["lr"], self.searches),
                edge_of_stability.efficiency(
                    view, group["lr"], self.settings.problem.measure_damping
                ),
                layer_health.factors(view, moments, self.searches),
                self.pairs.fired(view),
                self.pairs.quality(moments),
            ]
        return [{**row, "n": self.grid.examples} for row in itertools.chain(*found)]
