"""Figures: pure functions from a run's records to a matplotlib Figure.

Each takes the records of a whole run and filters for itself, so that a name keeps its colour in
all figures of the run. What is drawn is found in the data: an approximation or a metric nobody
has heard of appears by itself.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogFormatter, MaxNLocator

from .summaries import BOUND, NOISE, PUBLISHED, ROUNDING, label, last

Look = dict[str, Any]  # keyword arguments of a matplotlib line

IN_UNITS_OF_NOISE = ("relative_error", "relative_error_best_scale")  # relative to ||C||, as noise
COLOURS = [sns.color_palette("colorblind")[i] for i in (0, 1, 2, 3, 4, 9, 5, 6)]  # not grey, yellow
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X"), ("-", (0, (5, 1)), (0, (1, 1)), "-.")
NOISE_LOOK: Look = {"color": "0.45", "linestyle": "--", "linewidth": 1.4}
PUBLISHED_LOOK: Look = {"linewidth": 5.5, "alpha": 0.3, "zorder": 1}
LINEAR = (
    "cosine",
    "step_cosine",
    "train_accuracy",
    "test_accuracy",
)  # other scales are chosen by the data
ZERO_LOOK: Look = {"color": "0.3", "marker": "$0$", "linestyle": "", "markersize": 7}
INFINITE_LOOK: Look = {"color": "0.3", "marker": r"$\infty$", "linestyle": "", "markersize": 9}


class PlainLogFormatter(LogFormatter):
    """Labels the ticks that its parent would, as 0.4 in place of 4e-01."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        """The label of one tick; empty for those left out."""
        return f"{x:g}" if super().__call__(x, pos) else ""


def natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 after layer 2."""
    return [(0, int(p)) if p.isdigit() else (1, p) for p in re.findall(r"\d+|\D+", name)]


def layer(block: str, size: int) -> str:
    """Return a panel's title, such as 'layer 0 · d = 3,120'."""
    return f"layer {block} · d = {size:,}"


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Return colour, marker and line of each name; the best Kronecker is black.

    Depends on the set of names, not on their order. Marker and line differ too, so that figures
    can be read in grey. A published curve is a broad pale line of its optimizer's colour.
    """
    found: dict[str, Look] = {BOUND: {"color": "black", "marker": "d", "linewidth": 1.6}}
    names = set(names)
    ours = {name.removesuffix(PUBLISHED) for name in names}
    for i, name in enumerate(sorted(ours - {BOUND, ""})):
        again = i // len(COLOURS)  # a colour comes back with another marker and line
        marker, line = MARKERS[(i + 5 * again) % len(MARKERS)], LINES[i % len(LINES)]
        colour = COLOURS[(i + again) % len(COLOURS)]
        found[name] = {"color": colour, "marker": marker, "linestyle": line, "linewidth": 1.4}
        if (printed := name + PUBLISHED) in names:
            found[printed] = {"color": colour, **PUBLISHED_LOOK}
    return found


def select(frame: pd.DataFrame, **wanted: str | int | float | None) -> pd.DataFrame:
    """Return the rows whose columns equal `wanted`; None leaves a column free.

    Raises: ValueError where none is left, saying which values there are instead.
    """
    for column, value in wanted.items():
        if value is not None:
            known = sorted(frame[column].unique())
            frame = frame[frame[column] == value]
            if frame.empty:
                raise ValueError(f"no records with {column} {value!r}; known: {known}")
    if frame.empty:
        raise ValueError("no records to draw")
    return frame


def loss_curves(frame: pd.DataFrame, x: str = "step") -> Figure:
    """Losses of the whole model along training: a panel per loss, a line per optimizer.

    x: step, epoch or seconds. Columns: metric (those that end in _loss), optimizer, step, value
    and x. Of several seeds, the median and the range.
    Raises: ValueError without such rows.
    """
    return _along_training(frame, "_loss", x, "loss (mean per example)")


def accuracy_curves(frame: pd.DataFrame, x: str = "step") -> Figure:
    """Accuracies (metrics that end in _accuracy), drawn as `loss_curves`."""
    return _along_training(frame, "_accuracy", x, "share of examples put into the right class")


def _along_training(frame: pd.DataFrame, ending: str, x: str, y: str) -> Figure:
    rows = select(frame[frame["metric"].str.endswith(ending) & frame[x].notna()], block="")
    later = rows[rows["step"] > 0]  # a logarithm has no place for the start
    dense_at_first = x == "seconds" and not later.empty and rows[x].median() < rows[x].max() / 8
    rows = later if dense_at_first else rows
    metrics = sorted(rows["metric"].unique(), reverse=True)  # training before test
    styles = looks(frame["optimizer"])
    shown = {name: styles[name] for name in sorted(rows["optimizer"].unique())}
    figure, panels = _panels(len(metrics))
    _scale(panels[0], rows["value"], metrics[0])
    for axes, metric in zip(panels, metrics, strict=True):
        own = rows[rows["metric"] == metric]
        for name in shown:
            _line(axes, own[own["optimizer"] == name], shown[name], x)
        _dress(axes, label(metric))
        if dense_at_first:
            _log_seconds(axes, rows[x])
    return _finish(figure, shown, rows, x, y)


def error_along_training(
    frame: pd.DataFrame, metric: str, truth: str, optimizer: str, damping: float | None = None
) -> Figure:
    """One panel per block: the metric against the step, a line with interval per approximation.

    Columns: all but seconds. The noise floor is drawn where it has the metric's unit; infinite
    values are marked at the upper edge. Of several seeds, the median and the range.
    Raises: ValueError without rows for this choice.
    """
    rows = select(frame, metric=metric, truth=truth, optimizer=optimizer, damping=damping)
    floor = _noise(frame[frame["optimizer"] == optimizer], metric, truth)
    styles, blocks = looks(frame["approximation"]), sorted(rows["block"].unique(), key=natural)
    shown = {name: styles[name] for name in sorted(rows["approximation"].unique())}
    figure, panels = _panels(len(blocks))
    _scale(panels[0], pd.concat([rows["value"], floor["value"]]), metric)
    for axes, block in zip(panels, blocks, strict=True):
        own = rows[rows["block"] == block]
        _line(axes, floor[floor["block"] == block], NOISE_LOOK)
        for name in shown:
            _line(axes, own[own["approximation"] == name], shown[name])
        _dress(axes, layer(block, own["size"].iloc[0]))
    shown |= {} if floor.empty else {"noise floor": NOISE_LOOK}
    figure.suptitle(f"Trained with {optimizer}, compared with the exact {label(truth)}")
    return _finish(figure, shown, rows, "step", label(metric))


def error_by_block(
    frame: pd.DataFrame, metric: str, truth: str, damping: float | None = None
) -> Figure:
    """One panel per optimizer: the metric at its last measured step, block by block.

    Columns: all but seconds. A dot with its interval per approximation; noise floor, infinite
    values and seeds as in `error_along_training`.
    Raises: ValueError without rows for this choice.
    """
    rows = last(select(frame, metric=metric, truth=truth, damping=damping))
    floor = last(_noise(frame, metric, truth))
    styles, blocks = looks(frame["approximation"]), sorted(rows["block"].unique(), key=natural)
    shown = {n: {**styles[n], "linestyle": ""} for n in sorted(rows["approximation"].unique())}
    middle, shifts = np.arange(len(blocks)), np.linspace(-0.3, 0.3, len(shown))
    figure, panels = _panels(rows["optimizer"].nunique())
    _scale(panels[0], pd.concat([rows["value"], floor["value"]]), metric)
    for axes, (optimizer, own) in zip(panels, rows.groupby("optimizer"), strict=True):
        heights = _summary(floor[floor["optimizer"] == optimizer], "block").reindex(blocks)
        axes.hlines(heights["value"], middle - 0.42, middle + 0.42, **NOISE_LOOK)
        for shift, name in zip(shifts, shown, strict=True):
            points = _summary(own[own["approximation"] == name], "block").reindex(blocks)
            _dots(axes, middle + shift, points, shown[name])
        axes.set_xticks(middle, blocks)
        _dress(axes, f"{optimizer}, step {own['step'].max():,}")
        axes.grid(visible=False, axis="x")
    shown |= {} if floor.empty else {"noise floor": NOISE_LOOK}
    figure.suptitle(f"Last measurement, compared with the exact {label(truth)}")
    return _finish(figure, shown, rows, "layer", label(metric))


def matrix_triptych(
    matrices: tuple[np.ndarray, np.ndarray, np.ndarray], names: tuple[str, str], size: int
) -> Figure:
    """Exact matrix, approximation and difference on one symmetric logarithmic colour scale.

    matrices: exact, approximation, approximation - exact, all [p, p]. names: of the first two.
    size: d, larger than p where the matrices were reduced; the figure then says how.
    Raises: ValueError for matrices of different shapes.
    """
    shapes = [matrix.shape for matrix in matrices]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes differ: {shapes}")
    titles = (f"exact {label(names[0])}", names[1], f"{names[1]} − exact")
    pictures = dict(zip(titles, matrices, strict=True))
    finite = np.abs(np.stack(list(pictures.values())))
    top = 10.0 ** math.ceil(math.log10(finite[np.isfinite(finite)].max(initial=0.0) or 1.0))
    norm = SymLogNorm(top * 1e-3, vmin=-top, vmax=top)  # three decades either side of zero
    colours = sns.color_palette("vlag", as_cmap=True).with_extremes(bad="0.5")
    figure = Figure(figsize=(12, 4.1), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (title, picture) in zip(panels, pictures.items(), strict=True):
        axes.imshow(picture, cmap=colours, norm=norm, interpolation="none")
        axes.set(title=title, xticks=[], yticks=[])
    ticks = [sign * top * 10.0**-k for sign in (-1, 1) for k in range(4)] + [0.0]
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, ticks=sorted(ticks))
    bar.ax.set_yticklabels([f"{tick:g}" for tick in sorted(ticks)])
    bar.set_label(f"entry (linear within ±{top * 1e-3:g})")
    figure.supxlabel(_what_cells_show(len(matrices[0]), size), fontsize="medium")
    return figure


def _noise(frame: pd.DataFrame, metric: str, truth: str) -> pd.DataFrame:
    """Noise-floor rows; none where the metric has another unit."""
    comparable = metric in IN_UNITS_OF_NOISE
    return frame[(frame["metric"] == NOISE) & (frame["truth"] == truth) & comparable]


def _summary(rows: pd.DataFrame, by: str) -> pd.DataFrame:
    """Median value and widest interval per step or block; a range where there are seeds."""
    whole = rows.assign(
        low=rows["low"].fillna(rows["value"]), high=rows["high"].fillna(rows["value"])
    )
    return whole.groupby(by).agg({"value": "median", "low": "min", "high": "max"})


def _line(axes: Axes, rows: pd.DataFrame, look: Look, x: str = "step") -> None:
    """Draw value against x with its interval as a band; a gap where the value is infinite.

    The points are those of the steps; where seeds differ in x, it is their median.
    """
    points = _summary(rows, "step")
    steps, finite = rows.groupby("step")[x].median().to_numpy(), points.where(np.isfinite(points))
    axes.plot(steps, finite["value"], **look, markersize=4, markevery=max(1, len(steps) // 8))
    colour = look["color"]
    axes.fill_between(steps, finite["low"], finite["high"], color=colour, alpha=0.15, linewidth=0)
    if len(steps) == 1:  # neither a band nor a line without markers could be seen
        axes.vlines(steps, finite["low"], finite["high"], color=colour)
        if "marker" not in look:
            axes.axhline(finite["value"].iloc[0], **look)
    _marks(axes, steps, points["value"].to_numpy(), colour)


def _dots(axes: Axes, x: np.ndarray, points: pd.DataFrame, look: Look) -> None:
    """Draw value and interval at the places x."""
    finite = points.where(np.isfinite(points))
    axes.vlines(x, finite["low"], finite["high"], color=look["color"], linewidth=1.2)
    axes.plot(x, finite["value"], **look, markersize=5)
    _marks(axes, x, points["value"].to_numpy(), look["color"])


def _marks(axes: Axes, x: np.ndarray, values: np.ndarray, colour: Any) -> None:
    """Mark infinite values at the upper edge and what a logarithm cannot show at the lower one.

    Marks of further names are moved inwards, lest they hide each other.
    """
    zero = (np.abs(values) <= ROUNDING) & (axes.get_yscale() == "log")
    edges = ((np.isinf(values), INFINITE_LOOK, 1, -0.06), (zero, ZERO_LOOK, 0, 0.06))
    for found, look, edge, inwards in edges:
        if found.any():  # an empty line that is not clipped upsets the layout
            height = edge + inwards * sum(li.get_marker() == look["marker"] for li in axes.lines)
            own = {**look, "color": colour, "transform": axes.get_xaxis_transform()}
            axes.plot(x[found], np.full(found.sum(), height), **own, clip_on=False, zorder=3)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    """`count` panels with common axes, at most three in a row."""
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(5.5, 3.7 * columns), 2.6 * rows + 1.3), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in panels[count:]:
        axes.remove()
    for axes in panels[max(0, count - columns) : count]:  # the lowest of each column
        axes.xaxis.set_tick_params(labelbottom=True)
    return figure, list(panels[:count])


def _dress(axes: Axes, title: str) -> None:
    """Title, light grid, no box."""
    axes.set_title(title, fontsize="medium")
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    sns.despine(ax=axes)


def _scale(axes: Axes, values: pd.Series, metric: str = "") -> None:
    """Choose the scale of the common y axis, before anything is drawn.

    Logarithmic where positive values span more than a decade, losses more than a factor of 4;
    symmetric logarithmic where signs mix beyond [-2, 2]; else linear, as always for cosines.
    """
    sizes = values[np.isfinite(values) & (values.abs() > ROUNDING)]
    if metric in LINEAR or sizes.empty:
        return
    span = 4 if metric.endswith("_loss") else 10
    if sizes.min() > 0 and sizes.max() > span * sizes.min():
        axes.set_yscale("log")
        axes.set_ylim(sizes.min() / 1.6, sizes.max() * 1.6)  # intervals may reach down to 0
        axes.yaxis.set_minor_formatter(PlainLogFormatter())
    elif sizes.min() < 0 and sizes.abs().max() > 2:
        axes.set_yscale("symlog", linthresh=0.1)
    else:
        return
    axes.yaxis.set_major_formatter("{x:g}")


def _finish(
    figure: Figure, shown: Mapping[str, Look], rows: pd.DataFrame, x: str, y: str
) -> Figure:
    """Name the common axes and put one legend below the panels."""
    dampings = sorted(rows["damping"].dropna().unique())
    y += f" (λ = {', '.join(f'{d:g}' for d in dampings)})" if dampings else ""
    figure.supylabel(y, fontsize="medium")
    if np.isinf(rows["value"]).any():
        shown = {**shown, "infinite": INFINITE_LOOK}
    if figure.axes[0].get_yscale() == "log" and (rows["value"].abs() <= ROUNDING).any():
        shown = {**shown, "zero up to rounding": ZERO_LOOK}
    handles = [Line2D([], [], label=name, **look) for name, look in shown.items()]
    inches = 0.6 + 0.08 * max((len(name) for name in shown), default=0)  # of the longest entry
    lines = math.ceil(len(handles) / max(1, figure.get_figwidth() // inches))
    columns = math.ceil(len(handles) / max(1, lines))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns)
    for axes in figure.axes:
        if axes.xaxis.get_tick_params()["labelbottom"]:
            axes.set_xlabel("seconds of training" if x == "seconds" else x)
        if x == "step" and not _far_apart(axes, rows):
            _whole_steps(axes, rows["step"])
    return figure


def _far_apart(axes: Axes, rows: pd.DataFrame) -> bool:
    """Whether some optimizers took many times the steps of others: then the steps are on a log."""
    ends = rows.groupby("optimizer")["step"].max()
    if ends.max() <= 4 * ends.min():
        return False
    first, last = float(rows.loc[rows["step"] > 0, "step"].min()), float(ends.max())
    axes.set_xscale("symlog", linthresh=first, linscale=0.3)
    decades = range(math.ceil(math.log10(first)), math.floor(math.log10(last)) + 1)
    # 0 and the first step lie close together: no label between them
    ticks = [10.0**k for k in decades] if len(decades) > 1 else [first, last]
    axes.xaxis.set_major_locator(FixedLocator([0.0, *ticks]))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(0, 1.2 * last)
    return True


def _log_seconds(axes: Axes, seconds: pd.Series) -> None:
    """A logarithm of the seconds, for evaluations dense at first."""
    axes.set_xscale("log")
    axes.set_xlim(0.8 * float(seconds.min()), 1.25 * float(seconds.max()))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(PlainLogFormatter())


def _whole_steps(axes: Axes, steps: pd.Series) -> None:
    """Ticks at the measured steps while they are few, else at round whole numbers."""
    few = steps.nunique() <= 5
    ticks = FixedLocator(sorted(steps.unique())) if few else MaxNLocator(5, integer=True)
    axes.xaxis.set_major_locator(ticks)


def _what_cells_show(pixels: int, size: int) -> str:
    """Caption of the triptych."""
    if pixels >= size:
        return f"d = {size:,}, every entry shown"
    reduced = f"d = {size:,} reduced to {pixels} × {pixels}"
    return f"{reduced}: each cell shows its entry of largest magnitude"
