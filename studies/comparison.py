"""The table of `optimizers_compared`: how far each got, and what SGD-momentum needs for the same.

A run here is the frame that `studies.trials.read` returns: a row per epoch and metric.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from studies.summaries import number

Run = pd.DataFrame
Settings = Sequence[tuple[str, Any]]
COLUMNS = (
    "optimizer",
    "settings",
    "train loss",
    "test loss",
    "test acc.",
    "seconds",
    "steps ×",
    "time ×",
)
METRICS = ("train_loss", "test_loss", "test_accuracy")


@dataclass(frozen=True)
class Row:
    """One optimizer: its final training loss, by which rows are sorted, and its cells in print."""

    loss: float
    cells: list[str]


def row(name: str, settings: str, runs: Sequence[Run], epochs: int, paces: Sequence[Run]) -> Row:
    """Medians over the runs after their epochs; the first one beside the pace of SGD-momentum.

    paces: SGD-momentum's runs, from the start and with the batches of the first of `runs`.
    """
    ends = pd.DataFrame([end(run, epochs) for run in runs])
    first, middle = ends.iloc[0], ends.median()
    needed = reached(paces, float(first["train_loss"]))
    ratios = (over(needed[unit], float(first[unit])) for unit in ("step", "seconds"))
    values = [_digits(middle[metric]) for metric in METRICS]
    if not np.isfinite(middle["train_loss"]):
        reasons = [run["ended"].iloc[0] for run in runs if run["ended"].iloc[0]]
        reason = reasons[0] if reasons else "the loss was not finite at the end"
        settings = f"{settings}: {reason.partition(';')[0]}"
    cells = [name, settings, *values, number(float(middle["seconds"])), *ratios]
    return Row(float(middle["train_loss"]), cells)


def end(run: Run, epochs: int) -> dict[str, float]:
    """Where a run was after `epochs`: its losses are infinite if it did not get there."""
    rows = run[run["epoch"] == epochs].set_index("metric")
    found = {metric: rows["value"].get(metric, np.nan) for metric in METRICS}
    if rows.empty or not np.isfinite(found["train_loss"]):
        return {"train_loss": np.inf, "test_loss": np.inf} | dict.fromkeys(
            ("test_accuracy", "step", "seconds"), np.nan
        )
    return {**found, "step": rows["step"].iloc[0], "seconds": rows["seconds"].iloc[0]}


def reached(paces: Sequence[Run], loss: float) -> dict[str, tuple[float, bool]]:
    """Least steps and seconds with which any of the runs has this training loss, by unit.

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


def over(needed: tuple[float, bool], own: float) -> str:
    """The ratio in print, with > before a lower bound.

    >>> over((90, True), 30), over((180, False), 30)
    ('3.00', '> 6.00')
    """
    if not np.isfinite(needed[0] / own):
        return "–"
    return ("" if needed[1] else "> ") + number(needed[0] / own)


def settings(chosen: Settings, candidates: Sequence[Settings]) -> str:
    """Learning rate, clip and damping in print; * marks values at the edge of the grid.

    >>> grid = [[("lr", 0.1)], [("lr", 0.3)], [("lr", 1.0)]]
    >>> settings(grid[0], grid), settings(grid[1], grid)
    ('lr 0.1*', 'lr 0.3')
    """
    parts, values = [], dict(chosen)
    for name, short in (("lr", "lr"), ("kl_clip", "clip"), ("damping", "λ")):
        if name in values:
            tried = sorted({dict(other)[name] for other in candidates})
            edge = len(tried) > 1 and values[name] in (tried[0], tried[-1])
            parts.append(f"{short} {values[name]:g}{'*' if edge else ''}")
    return ", ".join(parts)


def table(rows: Sequence[Row], epochs: int, seeds: int, longer: int) -> dict[str, Any]:
    """The whole table, {"caption", "columns", "rows"}, the least loss first, no empty column."""
    caption = (
        f"After {epochs} epochs at the settings that were best for one seed, medians of {seeds} "
        "seed(s); * where the best value lies at the edge of its grid. steps ×, time ×: what "
        "SGD-momentum needs to get to the same training loss, at whichever learning rate of its "
        "grid does so first, over what the optimizer took, both with the tuning's seed. "
        f"SGD-momentum was given {longer} times the epochs; > where it did not get there."
    )
    ordered = [row.cells for row in sorted(rows, key=lambda row: row.loss)]
    kept = [i for i in range(len(COLUMNS)) if any(cells[i] != "–" for cells in ordered)]
    chosen = [[cells[i] for i in kept] for cells in ordered]
    return {"caption": caption, "columns": [COLUMNS[i] for i in kept], "rows": chosen}


def _digits(value: float) -> str:
    return f"{value:#.4g}" if np.isfinite(value) else number(value)
