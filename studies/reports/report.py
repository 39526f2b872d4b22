"""The report of one run: verdicts, tables and figures in one self-contained HTML file."""

import base64
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from matplotlib.figure import Figure

from ..results import records
from . import figures, sharpness_figures, stability_maps, summaries

MAIN, STEP = "relative_error", "step_cosine"  # drawn along training; drawn layer by layer

CAPTIONS = {
    "loss": "Loss of the whole model on training and test data, by {x}. Of several seeds, median "
    "and range of those that got so far.",
    "accuracy": "Share of the examples put into the right class, by {x}; seeds as for the loss.",
    MAIN: "Error of each approximation along training with {optimizer}, measured against the exact "
    "{truth} of each layer. Bands are the intervals of the estimates. Black is the best that any "
    "Kronecker product can do; dashed grey is how far two halves of the sample differ.",
    STEP: "Cosine between the damped step of each approximation and that of the exact {truth}, "
    "layer by layer at the last measured step; 1 is the same direction.",
    "stability": "How many seeds diverged, of how many, at each learning rate and damping; below "
    "it the median training loss at the end of the others.",
    "edge": "How near each training with {optimizer} was to instability before each step, and its "
    "loss. A run went wrong where a batch's loss exceeded twice its first.",
    "layers": "Greatest eigenvalue of each layer's part before trainings with {optimizer} went "
    "wrong: of the layer's own sharpness, and of its factors times what each is to be the inverse "
    "of (1 where it is). Medians over runs; at the right of those that did not go wrong.",
    "matrix": "Layer {block} after {step} steps of {optimizer}: the exact {truth}, the "
    "approximation {name} and their difference, on one symmetric logarithmic colour scale.",
}


@dataclass(frozen=True)
class Picture:
    """A figure with its file name (without .png) and its caption."""

    name: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """Return the figure as PNG."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def write_report(run: Path) -> Path:
    """Write run/report.html and its figures as run/figures/*.png; returns the report's path.

    Works on a run that has just started, or whose header or parts are damaged: the report then
    holds what there is and says what is missing.
    Raises: FileNotFoundError where there is no such folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise FileNotFoundError(f"no run folder {run}; `kronscope demo` makes one")
    frame, header = records.read(run), records.read_header(run)
    shown = []
    drawn = summaries.drawn(frame, header)
    for picture in [*pictures(drawn, run), *of_study(frame, header)]:
        png = picture.png()
        records.write_atomically(run / "figures" / f"{picture.name}.png", png)
        shown.append({"caption": picture.caption, "data": base64.b64encode(png).decode()})
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["label"] = summaries.label
    html = environment.get_template("report.html.j2").render(
        run=run.name,
        header=header,
        grids={summaries.TABLES[key]: header[key] for key in summaries.TABLES if key in header},
        damaged=frame.attrs["damaged"],
        count=len(frame),
        verdicts=summaries.verdicts(frame),
        losses=losses(frame),
        tables=[table(frame, truth, header) for truth in truths(frame)],
        pictures=shown,
    )
    return records.write_atomically(run / "report.html", html.encode())


def truths(frame: pd.DataFrame) -> list[str]:
    """Return the exact matrices that the run was compared with."""
    return sorted(set(frame["truth"]) - {""})


def losses(frame: pd.DataFrame) -> dict[str, dict[str, str]]:
    """Final losses as text, {optimizer: {loss: value}}.

    Of several seeds, the median of those that got so far, and how many they are.
    """
    every = frame[frame["metric"].str.endswith("_loss")]
    rows, tried = summaries.last(every), every.groupby("optimizer")["seed"].nunique()
    found: dict[str, dict[str, str]] = {}
    for (optimizer, metric), own in rows.groupby(["optimizer", "metric"]):
        place = found.setdefault(str(optimizer), {"step": f"{own['step'].max():,}"})
        if tried.max() > 1:
            place["seeds"] = f"{own['seed'].nunique()} of {tried[str(optimizer)]}"
        place[summaries.label(str(metric))] = summaries.number(own["value"].median())
    return found


def table(frame: pd.DataFrame, truth: str, header: Mapping[str, Any]) -> dict[str, Any]:
    """The medians of `summaries.medians` as text, with the best of each column marked.

    A cell is (text, is best). Marked is, per optimizer, the value nearest to what the header calls
    the metric's best; the best Kronecker, being a bound, does not compete.
    """
    values = summaries.medians(frame, truth)
    metrics = [m for m in values.columns if m != summaries.NOISE]
    rows = []
    for optimizer, own in values.groupby(level="optimizer"):
        own = own.droplevel("optimizer")
        rivals = own.drop([summaries.BOUND, ""], errors="ignore")
        best = {metric: _nearest(rivals[metric], header, metric) for metric in metrics}
        for name in (n for n in own.index if n):
            cells = [(summaries.number(own.loc[name, m]), best[m] == name) for m in metrics]
            rows.append({"optimizer": optimizer, "approximation": name, "cells": cells})
    title = summaries.label(truth)
    return {"truth": title, "metrics": [summaries.label(m) for m in metrics], "rows": rows}


def _nearest(values: pd.Series, header: Mapping[str, Any], metric: str) -> str | None:
    """Name of the value nearest to the metric's best; None where the header gives no number."""
    best = re.match(r"\s*([-+]?\d+(\.\d+)?)", str(_definition(header, metric).get("best", "")))
    finite = values[np.isfinite(values)]
    if best is None or finite.empty:
        return None
    return str((finite - float(best[1])).abs().idxmin())


def _definition(header: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """What the header says of a metric."""
    return dict(header.get("metrics", {}).get(metric, {}))


def pictures(frame: pd.DataFrame, run: Path) -> Iterator[Picture]:
    """Yield the report's figures, as many as the records allow."""
    yield from _training(frame)
    for truth in truths(frame):
        own = frame[frame["truth"] == truth]
        for optimizer in sorted(own.loc[own["metric"] == MAIN, "optimizer"].unique()):
            caption = CAPTIONS[MAIN].format(truth=summaries.label(truth), optimizer=optimizer)
            drawn = figures.error_along_training(frame, MAIN, truth, optimizer)
            yield Picture(f"{MAIN}-{truth}-{optimizer}", caption, drawn)
        if (own["metric"] == STEP).any():
            caption = CAPTIONS[STEP].format(truth=summaries.label(truth))
            yield Picture(f"{STEP}-{truth}", caption, figures.error_by_block(frame, STEP, truth))
    yield from _matrices(run)


def _training(frame: pd.DataFrame) -> Iterator[Picture]:
    """Yield losses and accuracies: by step beside measurements, else by epoch and by seconds.

    By step, epoch and seconds where optimizers had batches of different sizes.
    """
    axes = ("step",) if truths(frame) else ("epoch", "seconds")
    started = frame[frame["epoch"] > 0]
    if not truths(frame) and (started["step"] / started["epoch"]).round(6).nunique() > 1:
        axes = ("step", *axes)
    drawn = {"loss": figures.loss_curves, "accuracy": figures.accuracy_curves}
    for kind, draw in drawn.items():
        if frame["metric"].str.endswith(f"_{kind}").any():
            for x in axes:
                name = kind if x == "step" else f"{kind}-{x}"
                yield Picture(name, CAPTIONS[kind].format(x=x), draw(frame, x))


def of_study(frame: pd.DataFrame, header: Mapping[str, Any]) -> Iterator[Picture]:
    """Yield the figures that only this run's study has; most studies have none."""
    yield from _maps(header)
    yield from _edges(frame, header)


def _maps(header: Mapping[str, Any]) -> Iterator[Picture]:
    """Yield the stability map, if the study had more points than the recommended one."""
    rows = header.get("stability", [])
    if len(rows) > len({row["optimizer"] for row in rows}):
        yield Picture("stability", CAPTIONS["stability"], stability_maps.stability_map(rows))


def _edges(frame: pd.DataFrame, header: Mapping[str, Any]) -> Iterator[Picture]:
    """Yield the sharpness of each optimizer's runs, and of their layers where measured."""
    for optimizer, limit in header.get("stable_below", {}).items():
        own = frame[frame["optimizer"] == optimizer]
        if len(own):
            caption = CAPTIONS["edge"].format(optimizer=optimizer)
            yield Picture(
                f"edge-{optimizer}",
                caption,
                sharpness_figures.run_curves(own, optimizer, limit),
            )
        if sharpness_figures.has_layers(own):
            caption = CAPTIONS["layers"].format(optimizer=optimizer)
            yield Picture(
                f"layers-{optimizer}",
                caption,
                sharpness_figures.layer_map(own, optimizer),
            )


def _matrices(run: Path) -> Iterator[Picture]:
    """Yield, per optimizer, the smallest stored block at its last step with one approximation.

    The one that the optimizer itself holds is preferred, then KFAC; the GGN before the Hessian.
    """
    index = summaries.last(records.list_matrices(run)).sort_values(["size", "truth"])
    for _, place in index.groupby("optimizer").head(1).iterrows():
        found = records.load_matrices(place["path"])
        live = [name for name in found if name.endswith(("_live", "_live_undamped"))]
        name = next((name for name in (*live, "kfac") if name in found), None)
        if name:
            where = {column: place[column] for column in ("block", "step", "optimizer")}
            truth = place["truth"]
            caption = CAPTIONS["matrix"].format(truth=summaries.label(truth), name=name, **where)
            triple = (found["exact"], found[name], found[records.difference_name(name)])
            drawn = figures.matrix_triptych(triple, (truth, name), int(place["size"]))
            yield Picture(f"matrices-{place['optimizer']}", caption, drawn)
