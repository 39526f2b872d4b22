"""Tests of the paper's claims on block-diagonal Hessian-free, from runs of the study.

A run here is the frame that `trials.read` returns: a row per epoch and metric; runs are
lists over seeds. Numbers are medians over the seeds.
"""

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
import pandas as pd

from ..reports.comparison_tables import METRICS, end
from ..reports.summaries import number
from ..results.tables import Table

Losses = pd.DataFrame
COLUMNS = ("run", "settings", "updates", "train loss", "test loss", "test acc.", "ms / update")
FEWER, CHEAP, RISE = 8.0, 1.1, 1.05  # "about ten times", "as much as", "rises"


def table(runs: Mapping[str, Sequence[Losses]], settings: Mapping[str, str], epochs: int) -> Table:
    """Final losses, accuracy, updates and milliseconds per update of each run."""
    rows = []
    for name, own in runs.items():
        ends = pd.DataFrame([end(run, epochs) for run in own]).median()
        values = [number(ends[metric]) for metric in METRICS]
        each = number(1e3 * seconds_per_update(own))
        updates = "–" if np.isnan(ends["step"]) else f"{ends['step']:g}"
        rows.append([name, settings[name], updates, *values, each])
    caption = (
        f"After {epochs} epochs at the settings that were best for one seed, medians of "
        f"{len(next(iter(runs.values())))} seed(s). Curvature: examples of the large batch that "
        "the matrix is made of."
    )
    return Table(caption, COLUMNS, rows).without_empty_columns()


def fewer_updates(small: Sequence[Losses], block: Sequence[Losses]) -> str:
    """Claim: block HF gets as far as Adam in small batches, in about ten times fewer updates."""
    losses = [median(_losses(run)[-1] for run in own) for own in (small, block)]
    claim = (
        "block HF in large batches gets as far as Adam in small ones in about ten times fewer "
        f"updates. They ended at {losses[1]:.4g} and {losses[0]:.4g}"
    )
    target = max(losses)
    if not np.isfinite(target):
        return f"{verdict(False)}: {claim}."
    needed = [median(_updates(run, target) for run in own) for own in (small, block)]
    holds = losses[1] <= losses[0] and needed[0] >= FEWER * needed[1]
    return (
        f"{verdict(holds)}: {claim}; to {target:.4g} Adam took {needed[0]:g} updates, block HF "
        f"{needed[1]:g}: {number(needed[0] / max(1.0, needed[1]))} times fewer."
    )


def not_worse_than_plain(pairs: Mapping[int, tuple[Sequence[Losses], Sequence[Losses]]]) -> str:
    """Claim: block HF does at least as well as plain HF at every curvature batch size.

    pairs: (runs of plain HF, of block HF) by curvature batch; left out where both diverge.
    """
    parts, good = [], []
    for size, (plain, block) in pairs.items():
        losses = [
            [median(_losses(run, metric)[-1] for run in own) for own in (block, plain)]
            for metric in METRICS[:2]
        ]
        if np.isinf(losses).all():
            parts.append(f"{size}: both diverged")
            continue
        good += [mine <= other for mine, other in losses]
        (a, b), (c, d) = losses
        parts.append(f"{size}: {a:.4g} to {b:.4g} in training, {c:.4g} to {d:.4g} in test")
    return (
        f"{verdict(bool(good) and all(good))}: block HF does at least as well as plain HF at each "
        f"curvature batch size. In {sum(good)} of {len(good)} losses; {'; '.join(parts)}."
    )


def costs(
    adam: Sequence[Losses], pairs: Mapping[int, tuple[Sequence[Losses], Sequence[Losses]]]
) -> str:
    """Claim: an update of block HF costs as much as one of plain HF; also over one of Adam."""
    over_plain = [seconds_per_update(b) / seconds_per_update(a) for a, b in pairs.values()]
    over_adam = [seconds_per_update(b) / seconds_per_update(adam) for _, b in pairs.values()]
    return (
        f"{verdict(max(over_plain) <= CHEAP)}: an update of block HF costs as much as one of plain "
        f"HF. {_range(over_plain)} times as much; {_range(over_adam)} times Adam's in the same "
        "batches."
    )


def late_rise(adam: Sequence[Losses]) -> str:
    """Claim: Adam's training loss rises late in large batches."""
    rise = median(_losses(run)[-1] / min(_losses(run)) for run in adam)
    return (
        f"{verdict(rise > RISE)}: Adam's training loss rises late in large batches. It ended "
        f"{number(rise)} times its least."
    )


def verdict(holds: bool) -> str:
    """Whether a claim holds, in words."""
    return "holds" if holds else "does not hold"


def seconds_per_update(runs: Sequence[Losses]) -> float:
    """Median over the runs of training time over updates."""
    return median(run["seconds"].max() / max(1, run["step"].max()) for run in runs)


def _losses(run: Losses, metric: str = "train_loss") -> list[float]:
    """Losses by epoch; the last is infinite if the run diverged."""
    values = run.loc[run["metric"] == metric, "value"].tolist()
    return [*values, np.inf] if run["ended"].iloc[0] else values


def _updates(run: Losses, loss: float) -> float:
    """First update after which the training loss is at most `loss`; infinite if none is."""
    rows = run[(run["metric"] == "train_loss") & (run["value"] <= loss)]
    return float(rows["step"].min()) if len(rows) else np.inf


def _range(values: Sequence[float]) -> str:
    return f"{number(min(values))} to {number(max(values))}"
