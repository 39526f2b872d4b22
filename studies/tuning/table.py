"""The table of a search: its best trainings, where they ended and why."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..reports.comparison_tables import METRICS
from ..reports.comparison_tables import settings as in_print
from ..reports.summaries import last, number

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from .searches import Search

COLUMNS = ("settings", "epochs", "train loss", "test loss", "test acc.", "seconds", "end")
SHOWN = 8  # lines that a figure tells apart by colour


def table(found: "Sequence[FrozenTrial]", search: "Search", frame: pd.DataFrame) -> dict[str, Any]:
    """What goes into the header; found: the study's trials, frame: the run's records.

    "comparison": the trainings that got furthest, in print; "shown": their names in the records;
    "best": all settings of the best that was trained to the end, null if all diverged.
    """
    ended = [trial for trial in found if trial.state.name in ("COMPLETE", "PRUNED")]
    ordered = sorted(ended, key=_loss)[:SHOWN]
    points = [list(trial.params.items()) for trial in ended]
    ends = last(frame[frame["block"] == ""])
    rows = []
    for trial in ordered:
        own = ends[ends["optimizer"] == search.label(trial.params)]
        rows.append([in_print(list(trial.params.items()), points), *_numbers(own), end(trial)])
    kept = [i for i in range(len(COLUMNS)) if any(row[i] != "–" for row in rows)]
    whole = [t for t in ended if t.state.name == "COMPLETE" and np.isfinite(_loss(t))]
    best = min(whole, key=_loss, default=None)
    return {
        "comparison": {
            "caption": caption(ended, search),
            "columns": [COLUMNS[i] for i in kept],
            "rows": [[row[i] for i in kept] for row in rows],
        },
        "shown": [search.label(trial.params) for trial in ordered],
        "best": dict(search.trial(best.params).settings) if best else None,
    }


def _loss(trial: "FrozenTrial") -> float:
    return np.inf if trial.value is None else trial.value


def end(trial: "FrozenTrial") -> str:
    """Why a training ended before its epochs; – if it did not."""
    if reason := trial.user_attrs.get("ended"):
        return str(reason).partition(";")[0]
    return "stopped early" if trial.state.name == "PRUNED" else "–"


def caption(ended: "Sequence[FrozenTrial]", search: "Search") -> str:
    """What the table shows, and what became of all trainings."""
    counts = Counter("∞" if "ended" in t.user_attrs else t.state.name for t in ended)
    parts = {"COMPLETE": "trained to the end", "PRUNED": "stopped early", "∞": "diverged"}
    said = ", ".join(f"{counts[key]} {what}" for key, what in parts.items() if counts[key])
    return (
        f"{search.optimizer} on {search.problem}, {search.budget} epochs, seed {search.seed}, "
        f"{search.source}: the {min(SHOWN, len(ended))} of {len(ended)} with the least training "
        f"loss ({said}). * nothing beyond it was tried."
    )


def _numbers(own: pd.DataFrame) -> list[str]:
    """Epochs, losses, accuracy and seconds of one training's last rows, in print."""
    if own.empty:
        return ["0", *["–"] * len(METRICS), "–"]
    values = own.set_index("metric")["value"]
    shown = [number(float(values.get(metric, np.nan))) for metric in METRICS]
    return [f"{own['epoch'].iloc[0]:g}", *shown, number(float(own["seconds"].iloc[0]))]
