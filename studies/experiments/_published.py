"""Published training curves (published.json, one per optimizer), to compare ours with.

Each is a single run of its authors' code, printed after every epoch; their seconds, on other
machines, are left out. K-BFGS's and KFAC's losses hold the weight decay's ½·10⁻⁵‖θ‖² (about 0.01).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd

from ..reports.summaries import PUBLISHED
from ..results.records import loss_row
from ..results.tables import Table

EPOCHS = (1, 2, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Curve:
    """Losses after epochs 1, 2, ..., where they were printed, and the seed of the run."""

    source: str
    seed: int
    train_loss: Sequence[float]
    test_loss: Sequence[float]


@lru_cache(maxsize=1)
def _all() -> dict[str, dict[str, Any]]:
    return dict(json.loads((files(__package__) / "published.json").read_text()))


def curves(problem: str) -> dict[str, Curve]:
    """Published curves on the problem by optimizer; {} if none is known."""
    return {name: Curve(**content) for name, content in _all().get(problem, {}).items()}


def rows(
    shared: Mapping[str, Any], optimizer: str, steps_per_epoch: int, epochs: int
) -> list[dict[str, Any]]:
    """Records of a published curve up to `epochs`, under the optimizer "<name>, published".

    shared: the columns run, study and problem. The seconds are NaN.
    """
    curve = curves(shared["problem"])[optimizer]
    own = {**shared, "optimizer": optimizer + PUBLISHED, "seed": curve.seed, "seconds": np.nan}
    return [
        {**own, "step": k * steps_per_epoch, "epoch": float(k), **loss_row(metric, value)}
        for metric in ("train_loss", "test_loss")
        for k, value in enumerate(getattr(curve, metric)[:epochs], start=1)
    ]


def table(problem: str, runs: Mapping[str, Sequence[pd.DataFrame]], epochs: int) -> Table:
    """Training losses beside the published ones at some EPOCHS.

    runs: {optimizer: the frames of its runs that got to the end}, as `trials.read` returns
    them. A cell: the mean over these, how far it is from the published one, and the range.
    """
    known = curves(problem)
    marks = [epoch for epoch in EPOCHS if epoch <= epochs]
    cells = []
    for name in (name for name in runs if name in known and runs[name]):
        losses = [frame[frame["metric"] == "train_loss"].set_index("epoch") for frame in runs[name]]
        curve = known[name].train_loss
        printed = [curve[epoch - 1] if epoch <= len(curve) else np.nan for epoch in marks]
        own = [[float(loss["value"][epoch]) for loss in losses] for epoch in marks]
        ours = [_against(*pair) for pair in zip(own, printed, strict=True)]
        cells.append([name, "published", *(f"{v:.1f}" if v == v else "–" for v in printed)])
        cells.append([name, f"ours, {len(losses)} seed(s)", *ours])
    sources = sorted({known[name].source for name in runs if name in known})
    caption = (
        "Training loss after some epochs. Ours: the mean over the seeds that converged, how far it "
        f"is from the published value, and the range. Published: {'; '.join(sources)}, one run "
        "each."
    )
    columns = ["optimizer", "run", *(f"epoch {epoch}" for epoch in marks)]
    return Table(caption, columns, cells)


def _against(values: Sequence[float], published: float) -> str:
    """Mean, deviation from the published value, and range, as text.

    >>> _against([101.0, 103.0], 100.0)
    '102.0 (+2.0 %; 101.0–103.0)'
    """
    mean = float(np.mean(values))
    off = [f"{100 * (mean / published - 1):+.1f} %"] if np.isfinite(published) else []
    spread = [f"{min(values):.1f}–{max(values):.1f}"] if len(values) > 1 else []
    return f"{mean:.1f} ({'; '.join(off + spread)})" if off or spread else f"{mean:.1f}"
