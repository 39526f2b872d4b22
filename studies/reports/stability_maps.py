"""Heat maps of divergence over learning rates and dampings, from the study `stability`."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

PALETTE = sns.color_palette("YlOrRd", as_cmap=True)  # monotone in lightness
SCALE = Normalize(0.0, 1.0)
WIDTH = 12.0  # inches; panels that do not fit side by side go below each other
DARK = 0.6  # share from which text is white


def stability_map(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Heat map of the share of seeds that diverged: learning rate across, damping up.

    rows: as `stability.outcome` returns them. In each cell what diverged of how many seeds,
    and below it the median training loss of the others. An optimizer without damping has one row;
    one with a kl_clip has that across.
    Raises: ValueError without rows.
    """
    if not rows:
        raise ValueError("no outcomes to draw")
    frame = pd.DataFrame(rows)
    names = list(frame["optimizer"].unique())
    sizes = [_axes(frame[frame["optimizer"] == name]) for name in names]
    wide = max(3.2, 0.85 * max(len(across) for _, across, _ in sizes) + 1.2)
    high = max(2.4, 0.6 * max(len(up) for *_, up in sizes) + 1.3)
    columns = min(len(names), max(1, int(WIDTH // wide)))
    lines = -(-len(names) // columns)
    size = (columns * wide + 1.0, lines * high)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in panels[len(names) :]:
        axes.remove()
    for axes, name, (key, across, up) in zip(panels, names, sizes, strict=False):
        _panel(axes, frame[frame["optimizer"] == name], key, across, up)
        axes.set_title(name, fontsize="medium")
    bar = figure.colorbar(ScalarMappable(SCALE, PALETTE), ax=list(panels[: len(names)]))
    bar.set_label("share of seeds that diverged")
    return figure


def _axes(own: pd.DataFrame) -> tuple[str, list[float], list[float]]:
    """Setting on the x axis, its values, and the dampings ([NaN] if there is none)."""
    key = "kl_clip" if own["kl_clip"].nunique() > 1 else "lr"
    dampings = sorted(own["damping"].dropna().unique())
    return key, sorted(own[key].unique()), dampings or [np.nan]


def _panel(
    axes: Axes, own: pd.DataFrame, key: str, across: Sequence[float], up: Sequence[float]
) -> None:
    shares = np.full((len(up), len(across)), np.nan)
    for row in own.to_dict("records"):
        i = 0 if np.isnan(row["damping"]) else list(up).index(row["damping"])
        j, part = list(across).index(row[key]), row["diverged"] / row["seeds"]
        shares[i, j] = part
        loss = f"\n{row['loss']:.4g}" if np.isfinite(row["loss"]) else ""
        colour = "white" if part >= DARK else "black"
        text = f"{row['diverged']}/{row['seeds']}{loss}"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize="small")
    axes.imshow(shares, cmap=PALETTE, norm=SCALE, origin="lower", aspect="auto")
    axes.set_xticks(range(len(across)), [f"{value:g}" for value in across])
    axes.set_yticks(range(len(up)), ["–" if np.isnan(v) else f"{v:g}" for v in up])
    axes.set(xlabel="learning rate" if key == "lr" else "KL clip", ylabel="damping λ")
