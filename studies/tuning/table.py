"""Table of a search: its best trainings, where they ended and why."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from optuna.trial import FrozenTrial

from ..reports.comparison_tables import METRICS
from ..reports.comparison_tables import settings as in_print
from ..reports.summaries import last, number
from ..results.tables import EMPTY, Table
from .searches import Search

COLUMNS = ("settings", "epochs", "train loss", "test loss", "test acc.", "seconds", "end")
SHOWN = 8  # lines that a figure tells apart by colour


def table(found: Sequence[FrozenTrial], search: Search, frame: pd.DataFrame) -> dict[str, Any]:
    """Results of a search for the run's header.

    found: the study's trials. frame: the run's records.
    "comparison": the trainings with the least loss, in print; "shown": their names in the records;
    "best": all settings of the best one that was trained to the end, null if all diverged.
    """
    ended = [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]
    ended.sort(key=_loss)
    points = [list(trial.params.items()) for trial in ended]
    ends = last(frame[frame["block"] == ""])
    rows, shown = [], [search.label(trial.params) for trial in ended[:SHOWN]]
    for trial, label, point in zip(ended, shown, points, strict=False):
        numbers = _numbers(ends[ends["optimizer"] == label])
        rows.append([in_print(point, points), *numbers, _end(trial)])
    best = next((t for t in ended if t.state.name == "COMPLETE" and np.isfinite(_loss(t))), None)
    shown_table = Table(_caption(ended, search), COLUMNS, rows)
    return {
        "comparison": shown_table.without_empty_columns().as_header(),
        "shown": shown,
        "best": dict(search.trial(best.params).settings) if best else None,
    }


def _loss(trial: FrozenTrial) -> float:
    return np.inf if trial.value is None else trial.value


def _end(trial: FrozenTrial) -> str:
    """Why a training ended before its epochs; – if it did not."""
    stopped = "stopped early" if trial.state.name == "PRUNED" else EMPTY
    return str(trial.user_attrs.get("ended", stopped)).partition(";")[0]


def _caption(ended: Sequence[FrozenTrial], search: Search) -> str:
    counts = Counter("∞" if "ended" in t.user_attrs else t.state.name for t in ended)
    parts = {"COMPLETE": "trained to the end", "PRUNED": "stopped early", "∞": "diverged"}
    said = ", ".join(f"{counts[key]} {what}" for key, what in parts.items() if counts[key])
    return (
        f"{search.optimizer} on {search.problem}, {search.budget} epochs, seed {search.seed}, "
        f"{search.searched.source}: the {min(SHOWN, len(ended))} of {len(ended)} with the least "
        f"training loss ({said}). * nothing beyond it was tried."
    )


def _numbers(own: pd.DataFrame) -> list[str]:
    """Epochs, losses, accuracy and seconds of one training's last rows, in print."""
    if own.empty:
        return ["0", *[EMPTY] * len(METRICS), EMPTY]
    values = own.set_index("metric")["value"]
    shown = [number(float(values.get(metric, np.nan))) for metric in METRICS]
    return [f"{own['epoch'].iloc[0]:g}", *shown, number(float(own["seconds"].iloc[0]))]
