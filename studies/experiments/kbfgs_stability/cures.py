"""What keeps K-BFGS from diverging at its published settings, and what does it cost?

Candidates are trained with the same seeds: the published algorithm, `KBFGSLimited` with several
limits, the variants of `kbfgs_stability.variants`, pairs that are not averaged, and smaller
steps. Judged by how many seeds diverge (as in `stability`), the loss where the published algorithm
converges anyway, and the time of a step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from rich.progress import Progress

from ... import problems
from ...reports.summaries import number, share, span
from ...results.runs import running
from ...results.tables import Table
from ...training import trials
from ...training.trials import Trial

NAME = "cures"
PUBLISHED = "published"
TIMES = 3.0  # by how much lr is smaller, and damping greater, in the candidates with such

# by name: the optimizer, what it takes beside the recommended settings, and factors of those
Candidate = tuple[str, Mapping[str, float], Mapping[str, float]]
CANDIDATES: dict[str, Candidate] = {
    PUBLISHED: ("kbfgs", {}, {}),
    **{
        f"limit {c:g}": ("kbfgs_limited", {"curvature_limit": c}, {})
        for c in (5.0, 10.0, 20.0, 40.0)
    },
    "undoing": ("kbfgs_undoing", {"curvature_limit": 1.0}, {}),
    "planned change at most 0.1": ("kbfgs_trusting", {"curvature_limit": 0.1}, {}),
    "limit 10 of steps alone": ("kbfgs_step_only", {"curvature_limit": 10.0}, {}),
    "ramp": ("kbfgs_ramped", {}, {}),
    "scaled start": ("kbfgs_scaled_start", {}, {}),
    "H_a inverted": ("kbfgs_inverted_input", {}, {}),
    "pairs of quarters": ("kbfgs_in_parts", {}, {}),
    "pairs not averaged": ("kbfgs", {"pair_decay": 0.0}, {}),
    "lr a third": ("kbfgs", {}, {"lr": 1 / TIMES}),
    "damping threefold": ("kbfgs", {}, {"damping": TIMES}),
}


@dataclass(frozen=True)
class Grid:
    """What the study runs over. cures: names in `CANDIDATES`; "published" is always among them."""

    problem: str = "mnist-autoencoder"
    cures: Sequence[str] = tuple(CANDIDATES)
    seed: int = 0
    seeds: int = 20
    epochs: int = 1
    workers: int = 2
    device: str = "cpu"


TINY = Grid("digits-autoencoder-small", ("limit 10", "undoing", "ramp"), seeds=2)


def run(grid: Grid, results: Path, progress: Progress, resume: Path | None = None) -> Path:
    """Run the study and return the run's folder; each training is written when it has ended.

    resume: as in `runs.running`; trainings that are there are kept.
    Raises: ValueError as `runs.running`, or an unknown cure.
    """
    if unknown := set(grid.cures) - set(CANDIDATES):
        raise ValueError(f"no cure {sorted(unknown)}; known: {list(CANDIDATES)}")
    with running(NAME, vars(grid), __doc__, results, resume) as (folder, header):
        chosen = {PUBLISHED, *grid.cures}
        wanted = {name: _trials(grid, name) for name in CANDIDATES if name in chosen}
        # seed by seed, so that a run cut short has compared all on the first ones
        in_order = [own[k] for k in range(grid.seeds) for own in wanted.values()]
        trials.complete_all(folder, in_order, grid.workers, "training", progress)
        for name, own in wanted.items():
            trials.record(folder, name.replace(" ", "-"), NAME, {name: own})
        header["comparison"] = table(trials.read_all(folder, wanted), grid).as_header()
    return folder


def _trials(grid: Grid, name: str) -> list[Trial]:
    optimizer, added, factors = CANDIDATES[name]
    settings = dict(problems.get(grid.problem).optimizers["kbfgs"])
    settings |= {key: settings[key] * factor for key, factor in factors.items()} | dict(added)
    items = tuple(sorted(settings.items()))
    seeds = range(grid.seed, grid.seed + grid.seeds)
    epochs, device = grid.epochs, grid.device
    return [Trial(grid.problem, optimizer, items, k, epochs, device=device) for k in seeds]


def table(frames: Mapping[str, Sequence[pd.DataFrame]], grid: Grid) -> Table:
    """Divergences, losses and step times, a row per candidate."""
    ends = {
        name: [trials.fell(frame, grid.epochs) for frame in own] for name, own in frames.items()
    }
    anyway = [k for k, (loss, _) in enumerate(ends[PUBLISHED]) if np.isfinite(loss)]
    rows = []
    for name, own in ends.items():
        losses = np.array([loss for loss, _ in own])
        stopped = [int(f["last_step"].iloc[0]) for f in frames[name] if f["ended"].iloc[0]]
        both = [k for k in anyway if np.isfinite(losses[k])]
        paces = [own[k][1] / ends[PUBLISHED][k][1] for k in both]
        rows.append(
            [
                name,
                share(int(np.isinf(losses).sum()), len(own)),
                span(stopped),
                _middle(losses[np.isfinite(losses)]),
                _middle(losses[both]),
                _middle(np.array(paces)),
            ]
        )
    caption = (
        f"K-BFGS, {grid.seeds} seed(s) from {grid.seed} on, {grid.epochs} epoch(s). diverged: with "
        "a 95 % Wilson interval. at step: median and range of those that stopped early. Training "
        "losses at the end, medians: of those that converged, and of those with whose seeds the "
        "published algorithm does. time: of a step, over its."
    )
    columns = ["cure", "diverged", "at step", "train loss", "where published converges", "time"]
    return Table(caption, columns, rows)


def _middle(values: np.ndarray) -> str:
    return number(float(np.median(values))) if len(values) else "–"
