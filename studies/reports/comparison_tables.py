"""The table of `optimizers_compared`: final losses, and what SGD-momentum needs to match them.

A run here is the frame that `studies.training.trials.read` returns: a row per epoch and metric.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..results.tables import Table
from .summaries import number

Losses = pd.DataFrame
Settings = Sequence[tuple[str, Any]]
COLUMNS = (
    "optimizer",
    "settings",
    "train loss",
    "test loss",
    "test acc.",
    "diverged",
    "seconds",
    "steps ×",
    "time ×",
)
SHORT = {"lr": "lr", "kl_clip": "clip", "damping": "λ", "eps": "ε", "weight_decay": "decay"}
ALWAYS = ("lr", "kl_clip", "damping")
METRICS = ("train_loss", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class RankedRow:
    """Cells of one optimizer, and its final training loss, by which rows are sorted."""

    loss: float
    cells: list[str]


def row(
    name: str,
    settings: str,
    runs: Sequence[Losses],
    epochs: int,
    paces: Sequence[Sequence[Losses]],
    tried: int = 0,
) -> RankedRow:
    """Medians over the runs after their epochs, and of their ratios to SGD-momentum's pace.

    paces: for each of `runs` SGD-momentum's, from the same start and with the same batches.
    tried: how many seeds were trained for these runs; 0: as many as there are runs.
    """
    ends = pd.DataFrame([end(run, epochs) for run in runs])
    middle = ends.median()
    ratios = (median_ratio(ends, paces, unit) for unit in ("step", "seconds"))
    values = [_digits(middle[metric]) for metric in METRICS]
    if not np.isfinite(middle["train_loss"]):
        reasons = [run["ended"].iloc[0] for run in runs if run["ended"].iloc[0]]
        reason = reasons[0] if reasons else "the loss was not finite at the end"
        settings = f"{settings}: {reason.partition(';')[0]}"
    tried = tried or len(runs)
    lost = tried - int(np.isfinite(ends["train_loss"]).sum())
    diverged = f"{lost} of {tried}" if lost else "–"
    cells = [name, settings, *values, diverged, number(float(middle["seconds"])), *ratios]
    return RankedRow(float(middle["train_loss"]), cells)


def end(run: Losses, epochs: int) -> dict[str, float]:
    """Losses, steps and seconds of a run after `epochs`; losses are infinite if it ended before."""
    rows = run[run["epoch"] == epochs].set_index("metric")
    found = {metric: rows["value"].get(metric, np.nan) for metric in METRICS}
    if rows.empty or not np.isfinite(found["train_loss"]):
        return {"train_loss": np.inf, "test_loss": np.inf} | dict.fromkeys(
            ("test_accuracy", "step", "seconds"), np.nan
        )
    return {**found, "step": rows["step"].iloc[0], "seconds": rows["seconds"].iloc[0]}


def reached(paces: Sequence[Losses], loss: float) -> dict[str, tuple[float, bool]]:
    """Fewest steps and seconds in which any of the runs reaches a training loss.

    A pair: the number, and whether it was reached; where it was not, the number is a lower bound,
    the length of the shortest run that lasted its epochs (NaN where none did).
    """
    found = {}
    for unit in ("step", "seconds"):
        losses = [run[run["metric"] == "train_loss"] for run in paces]
        hits = [rows.loc[rows["value"] <= loss, unit].min() for rows in losses]
        lengths = [rows[unit].max() for rows in losses if not rows["ended"].iloc[0]]
        bound = min(lengths, default=np.nan)
        hit = np.nanmin([*hits, np.inf])
        found[unit] = (float(hit), True) if np.isfinite(hit) else (float(bound), False)
    return found


def median_ratio(ends: pd.DataFrame, paces: Sequence[Sequence[Losses]], unit: str) -> str:
    """Median ratio of what SGD-momentum needed to what a run took, as text; of two the lower."""
    found = []
    for (_, own), pace in zip(ends.iterrows(), paces, strict=True):
        needed, hit = reached(pace, float(own["train_loss"]))[unit]
        ratio = needed / float(own[unit])
        found.append((ratio if np.isfinite(ratio) else -np.inf, hit))
    return in_print(*sorted(found)[(len(found) - 1) // 2])


def in_print(ratio: float, hit: bool) -> str:
    """A ratio as text, with > before a lower bound.

    >>> in_print(3.0, True), in_print(6.0, False), in_print(-np.inf, True)
    ('3.00', '> 6.00', '–')
    """
    return "–" if not np.isfinite(ratio) else ("" if hit else "> ") + number(ratio)


def settings(chosen: Settings, candidates: Sequence[Settings]) -> str:
    """Tuned settings as text; * marks values at the edge of the grid.

    Learning rate, clip and damping in any case, ε and weight decay where candidates differ in it.
    "defaults" where there are none: the optimizer's own.

    >>> grid = [[("lr", 0.1)], [("lr", 0.3)], [("lr", 1.0)]]
    >>> settings(grid[0], grid), settings(grid[1], grid)
    ('lr 0.1*', 'lr 0.3')
    """
    parts, values = [], dict(chosen)
    for name in (name for name in SHORT if name in values):
        tried = sorted({dict(other)[name] for other in candidates})
        edge = len(tried) > 1 and values[name] in (tried[0], tried[-1])
        if name in ALWAYS or len(tried) > 1:
            parts.append(f"{point({name: values[name]})}{'*' if edge else ''}")
    return ", ".join(parts) or "defaults"


def point(values: Mapping[str, float]) -> str:
    """Settings as text.

    >>> point({"lr": 0.001, "eps": 1e-08})
    'lr 0.001, ε 1e-08'
    """
    return ", ".join(f"{SHORT.get(name, name)} {value:g}" for name, value in values.items())


def table(rows: Sequence[RankedRow], budget: str, seeds: int, longer: int) -> Table:
    """The whole table, the least loss first, without empty columns.

    budget: how long they were trained, in words. longer: times its own that SGD-momentum had.
    """
    caption = (
        f"After {budget} at the settings that were best for one seed, medians of {seeds} "
        "seed(s); * where the best value lies at the edge of its grid. steps ×, time ×: what "
        "SGD-momentum needs to get to the same training loss from the same start, at whichever "
        "learning rate of its grid does so first for that seed, over what the optimizer took. "
        f"SGD-momentum was given {longer} times its epochs; > where it did not get there. "
        "diverged: how many of the seeds that were tried did not get to the end."
    )
    ordered = [row.cells for row in sorted(rows, key=lambda row: row.loss)]
    return Table(caption, COLUMNS, ordered).without_empty_columns()


def _digits(value: float) -> str:
    return f"{value:#.4g}" if np.isfinite(value) else number(value)
