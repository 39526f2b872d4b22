"""Shared by the pages: choice of the run, cached reading, pickers kept in the address."""

import argparse
import io
import os
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import streamlit as st
from matplotlib.figure import Figure
from pyarrow import parquet

from kronscope.studies.reports import summaries
from kronscope.studies.results import records

Option = TypeVar("Option", str, int, float)
Stamp = tuple[int, ...]
UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)
QUIET = 15 * 60  # seconds without a new file after which a run is thought dead
DRAWING = RLock()  # matplotlib's text layout is not safe between threads


@dataclass(frozen=True)
class LoadedRun:
    """Folder, header and records of a run."""

    folder: Path
    header: dict[str, Any]
    frame: pd.DataFrame

    def about(self, metric: str) -> str:
        """Return formula, range, best value and reference of a metric, as Markdown."""
        found = (self.header.get("metrics") or {}).get(metric)
        if not found:
            return f"{summaries.label(metric)}: not defined in the run's header"
        formula, where, best, source = (
            found.get(name, "not stated") for name in ("formula", "range", "best", "reference")
        )
        return f"{summaries.label(metric)}: `{formula}`, range {where}, best {best} ({source})"


def results_folder() -> Path:
    """Return the folder given by --results, else by $KRONSCOPE_RESULTS, else `results`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--results", default=os.environ.get("KRONSCOPE_RESULTS", "results"))
    return Path(parser.parse_known_args(sys.argv[1:])[0].results)


def run_folders() -> list[Path]:
    """Return the run folders, newest first; also those whose header is missing."""
    results = results_folder()
    if (results / "header.json").exists():  # the folder given is itself a run
        return [results]
    return records.runs(results)


def stamp(run: Path) -> Stamp:
    """Modification times of the run's folders: they change when a file is added."""
    folders = (run, run / "records", run / "matrices")
    return tuple(folder.stat().st_mtime_ns for folder in folders if folder.is_dir())


@st.cache_data(max_entries=20, show_spinner="Reading records")
def _read(run: str, stamped: Stamp) -> pd.DataFrame:  # noqa: ARG001 - part of the cache's key
    return records.read(run)


@st.cache_data(show_spinner="Counting records")  # small: as many entries as there are runs
def _count(run: str, stamped: Stamp) -> int:  # noqa: ARG001 - part of the cache's key
    found = 0
    for part in (Path(run) / "records").glob("part-*.parquet"):
        with suppress(*UNREADABLE):
            found += parquet.read_metadata(part).num_rows
    return found


@st.cache_data(max_entries=20, show_spinner="Looking for matrices")
def _list(run: str, stamped: Stamp) -> pd.DataFrame:  # noqa: ARG001 - part of the cache's key
    return records.list_matrices(Path(run))


def load(run: Path) -> LoadedRun:
    """Return the run with its records, read again only when there are new ones."""
    return LoadedRun(run, records.read_header(run), _read(str(run), stamp(run)))


def count(run: Path) -> int:
    """Number of records of the run; damaged files are left out."""
    return _count(str(run), stamp(run))


def matrices(run: Path) -> pd.DataFrame:
    """Index of the run's stored matrices; warns of damaged files and leaves them out."""
    index = _list(str(run), stamp(run))
    for text in index.attrs["damaged"]:
        st.warning(f"Some stored matrices cannot be read: {text}")
    return index


def pictures(path: str) -> dict[str, np.ndarray]:
    """Matrices of one stored file; {} with a warning if it is damaged."""
    try:
        return records.load_matrices(path)
    except UNREADABLE as error:
        st.warning(f"The stored matrices of this block cannot be read: {error}")
        return {}


def open_run() -> LoadedRun:
    """The run that the reader picks; the page stops with an explanation if there is none."""
    folders = {folder.name: folder for folder in run_folders()}
    if not folders:
        st.info(
            f"No runs in `{results_folder()}`. `kronscope demo` writes one in a few minutes; "
            "`kronscope dashboard --results FOLDER` shows another folder."
        )
        st.stop()
    run = load(folders[choose("Run", list(folders), "run", where=st.sidebar)])
    _explain(run)
    if run.header.get("status") == "running":
        _follow(run.folder, stamp(run.folder))
    if run.frame.empty:
        st.info("No records in this run yet. They appear here as soon as they are measured.")
        st.stop()
    return run


def _explain(run: LoadedRun) -> None:
    """Say what is unusual about the run."""
    status = str(run.header.get("status", "unknown"))
    if not run.header:
        st.warning(
            "This run's header.json is missing or damaged: its status, its settings and the "
            "definitions of its metrics are unknown. `kronscope demo` writes a complete run."
        )
    elif status == "running" and time.time() - max(stamp(run.folder)) / 1e9 > QUIET:
        st.warning("This run has written nothing for 15 minutes; it may have been killed.")
    elif status == "running":
        st.info("This run is still going; the page refreshes itself.")
    elif status != "finished":
        st.warning(f"This run did not finish ({status}). What it measured until then is shown.")
    if damaged := run.frame.attrs["damaged"]:
        lines = "\n".join(f"- `{text}`" for text in damaged)
        st.warning(
            f"{len(damaged)} damaged file(s) left out; delete them, or run the study again "
            f"(`kronscope demo`):\n{lines}"
        )


@st.fragment(run_every="5s")
def _follow(run: Path, seen: Stamp) -> None:
    """Draw the page again when the run has written something."""
    if stamp(run) != seen:
        st.rerun()


def say_nothing_compared(run: LoadedRun, what: str) -> None:
    """Explain why `what` of the page is missing, and whether it may come."""
    if run.header.get("status") == "running":
        st.info(f"This run has compared nothing yet; {what} with the first comparison.")
    else:
        st.info(
            "This run compares no approximation with an exact matrix, layer by layer; "
            "`kronscope demo` and `kronscope study error_along_training` do."
        )


def choose(
    label: str,
    options: Sequence[Option],
    key: str,
    *,
    default: Option | None = None,
    show: Callable[[str], str] = str,
    about: Callable[[str], str] | None = None,
    where: Any = st,
) -> Option:
    """Return the reader's choice; it is kept in the address and from page to page.

    show: how an option is printed. about: the tooltip of the option chosen.
    """
    by_text = {str(option): option for option in options}
    wanted = st.query_params.get(key, st.session_state.get(f"kept {key}"))
    if st.session_state.get(key) not in by_text:
        fallback = str(default) if str(default) in by_text else next(iter(by_text))
        st.session_state[key] = wanted if wanted in by_text else fallback
    tooltip = about(st.session_state[key]) if about else None
    text = where.selectbox(label, list(by_text), key=key, format_func=show, help=tooltip)
    st.session_state[f"kept {key}"] = text  # a widget's own state ends with its page
    if st.query_params.get(key) != text:
        st.query_params[key] = text
    return by_text[text]


def draw(figure: Figure) -> None:
    """Show a figure, at most as wide as the page."""
    picture = io.BytesIO()
    with DRAWING:
        figure.savefig(picture, format="png", dpi=120)
    st.image(picture)


def show_table(run: LoadedRun, table: pd.DataFrame) -> None:
    """Show a table whose columns are metrics, with their definitions as tooltips."""
    config = {
        name: st.column_config.TextColumn(summaries.label(name), help=run.about(name))
        for name in table.columns
    }
    st.dataframe(table, column_config=config)


def with_intervals(rows: pd.DataFrame) -> pd.DataFrame:
    """Return approximation x metric, each cell the value in print with its interval, if any.

    Several seeds or dampings are listed one after the other.
    """
    cells = rows["value"].map(summaries.number)
    bounds = rows["low"].map(summaries.number) + ", " + rows["high"].map(summaries.number)
    cells = cells.where(rows["low"].isna(), cells + " [" + bounds + "]")
    texts = rows.assign(cell=cells)
    table = texts.pivot_table("cell", "approximation", "metric", "; ".join).fillna("–")
    return table[summaries.in_order(table.columns)]
