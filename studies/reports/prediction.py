"""Prediction of divergence by a threshold on a number: hits and false alarms.

A run is predicted (a hit) if the number exceeds the threshold at some step before the run goes
wrong; a false alarm is a run in which it does although the run never goes wrong. The threshold
with the greatest difference of the two shares (Youden's J) is chosen on the runs of even seeds and
judged on the odd ones.

Source of J: Youden 1950, "Index for rating diagnostic tests".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from ..results.tables import Table
from .summaries import number

WRONG = 2.0  # times the first loss of the run: none that rose so far came back by itself
COLUMNS = ("number", "threshold", "predicted", "false alarms", "steps ahead")


@dataclass(frozen=True)
class TracedRun:
    """One run: the number by step, and the step at which its loss went wrong, if ever."""

    values: Mapping[int, float]
    wrong: int | None

    def alarm(self, threshold: float) -> int | None:
        """First step before it went wrong at which the number exceeds the threshold."""
        steps = [
            step
            for step, value in sorted(self.values.items())
            if value > threshold and (self.wrong is None or step < self.wrong)
        ]
        return steps[0] if steps else None


def wrong_steps(frame: pd.DataFrame) -> dict[int, int | None]:
    """First step of each seed whose batch loss was wrong, or None; of one optimizer."""
    found: dict[int, int | None] = {}
    for seed, own in frame[frame["metric"] == "batch_loss"].groupby("seed"):
        losses = own.sort_values("step")
        wrong = losses.loc[~(losses["value"] <= WRONG * losses["value"].iloc[0]), "step"]
        found[int(str(seed))] = int(wrong.iloc[0]) if len(wrong) else None
    return found


def runs(frame: pd.DataFrame, chosen: pd.Series) -> dict[int, TracedRun]:
    """Runs by seed; chosen: mask of the rows that hold the number."""
    wrong, mine = wrong_steps(frame), frame[chosen]
    own = {seed: mine[mine["seed"] == seed] for seed in wrong}
    values = {
        seed: dict(zip(rows["step"], rows["value"], strict=True)) for seed, rows in own.items()
    }
    return {seed: TracedRun(values[seed], wrong[seed]) for seed in wrong}


def threshold(own: Sequence[TracedRun]) -> float:
    """The threshold with the largest Youden's J; of several the middle one.

    NaN without both runs that went wrong and runs that did not.

    >>> bad, good = TracedRun({1: 1.0, 2: 9.0}, wrong=3), TracedRun({1: 2.0, 2: 3.0}, wrong=None)
    >>> threshold([bad, good])
    6.0
    """
    values = sorted({value for run in own for value in run.values.values() if np.isfinite(value)})
    if not values or len({run.wrong is None for run in own}) < 2:
        return np.nan
    # between neighbours nothing changes: the middle of each gap stands for it
    between = [(a + b) / 2 for a, b in pairwise(values)] or values
    gains = [np.subtract(*rates(own, value)) for value in between]
    best = [value for value, gain in zip(between, gains, strict=True) if gain == max(gains)]
    return float(best[len(best) // 2])


def rates(own: Sequence[TracedRun], level: float) -> tuple[float, float]:
    """Share with an alarm of the runs that went wrong (hits), and of the others (false alarms)."""
    wrong = [run.alarm(level) is not None for run in own if run.wrong is not None]
    right = [run.alarm(level) is not None for run in own if run.wrong is None]
    return float(np.mean(wrong)) if wrong else np.nan, float(np.mean(right)) if right else np.nan


def table(frame: pd.DataFrame) -> Table:
    """A row per optimizer and predictor, judged on the odd seeds."""
    rows = []
    for optimizer, own in frame.groupby("optimizer"):
        whole = own["block"] == ""
        numbers = {
            "sharpness, Hessian": whole
            & (own["metric"] == "sharpness")
            & (own["truth"] == "hessian"),
            "sharpness, GGN": whole & (own["metric"] == "sharpness") & (own["truth"] == "ggn"),
            "curvature ratio of the last step": own["metric"] == "curvature_ratio",
        }
        for name, chosen in numbers.items():
            if chosen.any():
                found = runs(own, chosen)
                rows.append([f"{optimizer}: {name}", *_judged(found)])
    caption = (
        f"A run goes wrong where a batch's loss exceeds {WRONG:g} times its first. The threshold "
        "is chosen on even seeds (hits less false alarms); the other columns are of odd seeds. "
        "steps ahead: from the first alarm to the first wrong loss, median and range."
    )
    return Table(caption, COLUMNS, rows)


def _judged(found: Mapping[int, TracedRun]) -> list[str]:
    level = threshold([run for seed, run in found.items() if seed % 2 == 0])
    judged = [run for seed, run in found.items() if seed % 2]
    wrong = [run for run in judged if run.wrong is not None]
    if np.isnan(level):
        return ["–", f"– of {len(wrong)}", f"– of {len(judged) - len(wrong)}", "–"]
    alarms = [(run, run.alarm(level)) for run in judged]
    ahead = [run.wrong - step for run, step in alarms if step is not None and run.wrong is not None]
    false = sum(step is not None for run, step in alarms if run.wrong is None)
    lead = f"{np.median(ahead):g} ({min(ahead)}–{max(ahead)})" if ahead else "–"
    hits = f"{len(ahead)} of {len(wrong)}"
    return [number(level), hits, f"{false} of {len(judged) - len(wrong)}", lead]
