"""How close to instability does an optimizer train, and can that be seen before it diverges?

Before each step the greatest eigenvalue of lr P H is found by products alone (`diag.sharpness`),
with P the optimizer's preconditioner and H the exact Hessian or GGN of some training examples: of
the whole model, and now and then layer by layer. Beside it stand the loss of the coming batch and,
of an optimizer that sees it for nothing, the curvature ratio of the last step. Then a threshold on
each is chosen on half of the seeds and judged on the others.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from diag import Operator, Problem, exact, live
from diag.operators import like
from diag.sharpness import Sharpest, sharpest, side_by_side
from studies import foretelling, problems, records, training
from studies.pools import shared_pool
from studies.running import running
from studies.snapshots import loss_row

NAME = "sharpness_along_training"
WATCH_ONLY = {"kbfgs": {"curvature_limit": 1e30}, "kbfgs_l": {"curvature_limit": 1e30}}
ENOUGH = 0.05  # relative residual; the value's own error is far below it
PRODUCTS = 24


@dataclass(frozen=True)
class Grid:
    """What the study runs over.

    steps: of every training. layers_every: steps between measurements layer by layer, 0 for none.
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
    Raises: ValueError for a folder of another study or problem, or an optimizer without a
    preconditioner to be shown.
    """
    question = (__doc__ or "").partition("\n")[0]
    with running(NAME, dataclasses.asdict(grid), question, results, resume) as (folder, header):
        seeds = range(grid.seed, grid.seed + grid.seeds)
        wanted = list(itertools.product(grid.optimizers, seeds))
        missing = [place for place in wanted if not _path(folder, *place).is_file()]
        task = progress.add_task(
            "training", total=len(wanted), completed=len(wanted) - len(missing)
        )
        pool = shared_pool(grid.workers)
        pending = {pool.submit(trace, grid, *place): place for place in missing}
        try:
            for future in as_completed(pending):
                content = records.frame_of(_complete(folder, grid, future.result()))
                path = _path(folder, *pending[future])
                records.write_atomically(path, content.to_parquet(index=False))
                progress.advance(task)
        finally:
            for future in pending:  # nobody waits for these after an error
                future.cancel()
        header["comparison"] = foretelling.table(records.read(folder))
    return folder


def _path(folder: Path, optimizer: str, seed: int) -> Path:
    return folder / "records" / f"part-{optimizer}-{seed}.parquet"


def _complete(folder: Path, grid: Grid, rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    shared = {"run": folder.name, "study": NAME, "problem": grid.problem}
    return ({**shared, **row} for row in rows)


def trace(grid: Grid, optimizer: str, seed: int) -> list[dict[str, Any]]:
    """Train with one thread and measure before every step; rows without run, study and problem.

    batch_loss is that of the coming step. It ends where that has gone wrong (`foretelling.WRONG`),
    or was infinite because a factor could not be inverted.
    """
    torch.set_num_threads(1)
    problem = problems.get(grid.problem)
    hyper = dict(WATCH_ONLY.get(optimizer, {}))
    settings = training.Settings(problem, optimizer, training.FOREVER, seed, hyper=hyper)
    rows: list[dict[str, Any]] = []
    try:
        for place, found in _measured(grid, settings):
            rows += [{"optimizer": optimizer, "seed": seed, **place, **row} for row in found]
    except RuntimeError:
        if not rows or rows[-1]["step"] == 0:
            raise
        last = {name: rows[-1][name] for name in ("optimizer", "seed", "epoch", "seconds")}
        rows.append({**last, "step": rows[-1]["step"] + 1, **loss_row("batch_loss", np.inf)})
    return rows


def _measured(
    grid: Grid, settings: training.Settings
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Before each step: (step, epoch, seconds), and rows of what was measured."""
    edge, first = _Edge(grid), np.nan
    for state in training.steps(settings):
        if state.step >= grid.steps:
            return
        loss = training.batch_loss(state, settings)
        first = first if state.step else loss
        found = [loss_row("batch_loss", loss)]
        ratio = getattr(state.optimizer, "curvature_ratio", None)
        if ratio is not None:
            found.append(loss_row("curvature_ratio", float(ratio)))
        wrong = not loss <= foretelling.WRONG * first
        if state.step and not wrong:
            found += edge.rows(state, settings.problem)
        yield {"step": state.step, "epoch": state.epoch, "seconds": state.seconds}, found
        if wrong:
            return


class _Edge:
    """Sharpness from step to step: each search starts from the vector that the last one found."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.starts: dict[tuple[str, str], Tensor] = {}

    def rows(
        self, state: training.State, setting: problems.TrainingProblem
    ) -> list[dict[str, Any]]:
        """Greatest eigenvalue of lr P C: of the whole model, and of the layers at their turn."""
        data, n = state.data, self.grid.examples
        problem = Problem(
            state.model,
            setting.loss,
            data.train_inputs[:n],
            data.train_targets[:n],
            dtype=next(state.model.parameters()).dtype,
        )
        P = live.preconditioners(state.optimizer, next(state.model.parameters()).dtype)  # type: ignore[arg-type]
        layers = [block for block in problem.blocks() if block.name in P]
        whole = problem.group("", [block.name for block in layers])
        lr = state.optimizer.param_groups[0]["lr"]
        every, found = self.grid.layers_every, []
        for of in ("hessian", "ggn"):
            C = exact.truth(problem, whole, of)
            parts: list[tuple[str, int, Operator | _Part, Any]] = [
                ("", whole.d, C, side_by_side([P[block.name] for block in layers]))
            ]
            if every and state.step % every == 0:
                sizes = [block.d for block in layers]
                starts = np.cumsum([0, *sizes])
                for block, at in zip(layers, starts, strict=False):
                    part = _Part(C, int(at), block.d)
                    parts.append((block.name, block.d, part, P[block.name].__matmul__))
            for name, d, curvature, precondition in parts:
                value = self._search((of, name), curvature, precondition).value
                row = {**loss_row("sharpness", lr * value), "block": name, "size": d}
                found.append({**row, "truth": of, "n": n})
        return found

    def _search(self, key: tuple[str, str], curvature: Any, precondition: Any) -> Sharpest:
        start = self.starts.get(key)
        found = sharpest(curvature, precondition, start, tolerance=ENOUGH, products=PRODUCTS)
        self.starts[key] = found.dual
        return found


class _Part:
    """A layer's block of a curvature known by its products with whole vectors."""

    def __init__(self, whole: Any, at: int, d: int) -> None:
        self.whole, self.place = whole, slice(at, at + d)
        self.like = like(whole).new_zeros(d)
        self.shape = (d, d)

    def __matmul__(self, v: Tensor) -> Tensor:
        padded = self.like.new_zeros(self.whole.shape[0])
        padded[self.place] = v
        return (self.whole @ padded)[self.place]
