"""Figures of `sharpness_along_training`: sharpness of runs that went wrong and of others."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from . import prediction
from .figures import PlainLogFormatter, natural, select

WRONG, FINE = (sns.color_palette("colorblind")[i] for i in (3, 0))
PANELS = {  # title: (metric, truth)
    "λ_max of lr · P · Hessian": ("sharpness", "hessian"),
    "λ_max of lr · P · GGN": ("sharpness", "ggn"),
    "curvature ratio of the last step": ("curvature_ratio", ""),
    "loss of the coming batch": ("batch_loss", ""),
}
PARTS = {  # title: (metric, truth)
    "lr · P · Hessian of the layer": ("sharpness", "hessian"),
    "H_g · output Hessian": ("left_sharpness", "hessian"),
    "H_a · input moment": ("right_sharpness", ""),
}
LOWEST = 1e-2  # what is smaller or negative is drawn there: a scale in tens has no zero
PALETTE = sns.color_palette("rocket_r", as_cmap=True)  # monotone in lightness
FAINTEST, DARK = 0.1, 0.55  # the scale's lower end; share of it from which text is white
BIN, BINS = 3, 5  # steps before a run went wrong that are taken together, and how many such
RIGHT = "runs\nright"


def run_curves(frame: pd.DataFrame, optimizer: str, limit: float) -> Figure:
    """Sharpness, curvature ratio and batch loss against the step, a line per training.

    limit: greatest stable sharpness on a quadratic, dashed. Runs that went wrong end in a cross.
    Raises: ValueError without records of the optimizer.
    """
    own = select(frame, optimizer=optimizer)
    own = own[own["block"] == ""]
    found = prediction.wrong_steps(own)
    kept = {t: k for t, k in PANELS.items() if len(_of(own, *k))}
    figure = Figure(
        figsize=(4.6 * min(2, len(kept)), 3.2 * -(-len(kept) // 2)), layout="constrained"
    )
    panels = figure.subplots(-(-len(kept) // 2), min(2, len(kept)), squeeze=False).ravel()
    for axes, (title, key) in zip(panels, kept.items(), strict=False):
        _traces(axes, _of(own, *key), found)
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="step", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(PlainLogFormatter())
        if key[0] == "sharpness":
            axes.axhline(limit, color="0.3", linestyle="--", linewidth=1.2)
    for axes in panels[len(kept) :]:
        axes.remove()
    figure.legend(handles=_legend(found, limit), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _of(frame: pd.DataFrame, metric: str, truth: str) -> pd.DataFrame:
    return frame[(frame["metric"] == metric) & (frame["truth"] == truth)]


def _traces(axes: Axes, own: pd.DataFrame, found: Mapping[int, int | None]) -> None:
    # those that went wrong on top
    for seed in sorted(found, key=lambda seed: (found[seed] is not None, seed)):
        line = own[(own["seed"] == seed) & np.isfinite(own["value"])].sort_values("step")
        values = line["value"].clip(lower=LOWEST)
        bad = found[seed] is not None
        look: dict[str, Any] = {"color": WRONG if bad else FINE, "zorder": 3 if bad else 2}
        axes.plot(line["step"], values, linewidth=1.0, alpha=0.7, **look)
        if bad:
            axes.plot(line["step"].iloc[-1:], values.iloc[-1:], "x", markersize=5, **look)


def _legend(found: Mapping[int, int | None], limit: float) -> list[Line2D]:
    bad = sum(step is not None for step in found.values())
    return [
        Line2D([], [], color=FINE, label=f"{len(found) - bad} runs that stayed right"),
        Line2D([], [], color=WRONG, marker="x", label=f"{bad} runs that went wrong"),
        Line2D([], [], color="0.3", linestyle="--", label=f"stable below {limit:g} (quadratic)"),
    ]


def has_layers(own: pd.DataFrame) -> bool:
    """Whether one optimizer's records have what `layer_map` draws."""
    return bool(_layers(own)["wrong"].notna().any())


def _layers(own: pd.DataFrame) -> pd.DataFrame:
    """The rows of layers, each with the step at which its run went wrong, NaN for none."""
    wrong = pd.Series(prediction.wrong_steps(own), dtype=float)
    return own[own["block"] != ""].assign(wrong=lambda f: f["seed"].map(wrong))


def layer_map(frame: pd.DataFrame, optimizer: str) -> Figure:
    """Heat map of each layer's sharpness in the steps before runs went wrong.

    A panel per part: layers down, across the steps that were left, last the median of the runs that
    stayed right. Colours and numbers are medians over runs.
    Raises: ValueError without runs that went wrong and were measured layer by layer.
    """
    own = _layers(select(frame, optimizer=optimizer))
    if not own["wrong"].notna().any():
        raise ValueError("no run went wrong that was measured layer by layer")
    grids = {title: _grid(_of(own, *key)) for title, key in PARTS.items()}
    grids = {title: grid for title, grid in grids.items() if grid.size}
    top = max(np.nanmax(grid.to_numpy()) for grid in grids.values())
    norm = LogNorm(FAINTEST, max(top, 1.0))
    wide = max(grid.shape[1] for grid in grids.values())
    size = (len(grids) * (0.62 * wide + 0.6) + 1.2, 0.42 * max(map(len, grids.values())) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(grids), squeeze=False, sharey=True)[0]
    for axes, (title, grid) in zip(panels, grids.items(), strict=True):
        axes.set_title(title, fontsize="medium")
        _heat(axes, grid, norm)
    panels[0].set_ylabel("layer")
    bar = figure.colorbar(ScalarMappable(norm, PALETTE), ax=list(panels))
    bar.set_label("greatest eigenvalue, median over runs")
    return figure


def _grid(own: pd.DataFrame) -> pd.DataFrame:
    """Medians by layer and steps left, BIN by BIN, then of the runs that stayed right."""
    bad = own[own["wrong"].notna()].assign(bin=lambda f: (f["wrong"] - f["step"] - 1) // BIN)
    grid = bad[bad["bin"].between(0, BINS - 1)].pivot_table(
        "value", "block", "bin", aggfunc="median"
    )
    grid = grid.sort_index(axis=1, ascending=False)
    grid.columns = pd.Index([_left(int(b)) for b in grid.columns])
    grid[RIGHT] = own[own["wrong"].isna()].groupby("block")["value"].median().reindex(grid.index)
    return grid.loc[sorted(grid.index, key=natural)].dropna(axis=1, how="all")


def _left(place: int) -> str:
    return f"{BIN * place + 1}–{BIN * (place + 1)}"


def _heat(axes: Axes, grid: pd.DataFrame, norm: LogNorm) -> None:
    values = grid.to_numpy().clip(FAINTEST, None)
    axes.imshow(values, cmap=PALETTE, norm=norm, aspect="auto")
    for (i, j), value in np.ndenumerate(grid.to_numpy()):
        if np.isfinite(value):
            text = f"{value:.2g}" if value < 100 else f"{value:.0f}"
            colour = "white" if norm(max(value, FAINTEST)) > DARK else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize="small")
    axes.set_xticks(range(grid.shape[1]), list(grid.columns), fontsize="small")
    axes.set_yticks(range(len(grid)), grid.index)
    axes.set_xlabel("steps before the loss was wrong")
