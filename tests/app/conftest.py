"""Results folders in the states that the dashboard may meet."""

import math
import shutil

import pytest

from kronscope.studies.results import records
from tests import synthetic


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A results folder with one finished run of all three optimizers, two layers each."""
    folder = tmp_path_factory.mktemp("results")
    sizes = {name: synthetic.SIZES[name] for name in ("0", "10")}
    synthetic.write_run(folder, steps=(0, 50, 100), sizes=sizes)
    return folder


def _full(folder):
    """Nothing is wrong."""


def _empty(folder):
    shutil.rmtree(folder / "made-up")


def _missing(folder):
    shutil.rmtree(folder)


def _just_started(folder):
    for name in ("records", "matrices"):
        shutil.rmtree(folder / "made-up" / name)


def _nothing_compared(folder):
    """The first losses are there, the first comparison is not."""
    _just_started(folder)
    row = synthetic.row(optimizer="adam", step=0, metric="train_loss", value=1.0)
    records.append(folder / "made-up", [row])


def _whole_model_only(folder):
    """As sharpness_along_training writes it: numbers against exact matrices, none of a layer."""
    _just_started(folder)
    loss = synthetic.row(optimizer="adam", step=0, metric="batch_loss", value=1.0)
    own = {"optimizer": "adam", "step": 1, "metric": "sharpness", "size": 9056, "value": 2.0}
    sharp = [synthetic.row(truth=truth, **own) for truth in ("ggn", "hessian")]
    records.append(folder / "made-up", [loss, *sharp])


def _without_floors(folder):
    _rewrite(folder, [row for row in synthetic.rows((0,)) if row["metric"] != "noise_floor"])


def _floors_without_value(folder):
    rows = synthetic.rows((0,))
    _rewrite(folder, [r | {"value": math.nan} if r["metric"] == "noise_floor" else r for r in rows])


def _rewrite(folder, rows):
    shutil.rmtree(folder / "made-up" / "records")
    records.append(folder / "made-up", rows)


def _no_definitions(folder):
    header = synthetic.HEADER | {"metrics": None}
    records.write_header(folder / "made-up", header)


def _running(folder):
    header = synthetic.HEADER | {"status": "running"}
    records.write_header(folder / "made-up", header)


def _diverged(folder):
    header = synthetic.HEADER | {"status": "diverged: the loss is not finite at step 60"}
    records.write_header(folder / "made-up", header)


def _compared(folder):
    """What studies put into the header: tables, claims, and which optimizers are to be drawn."""
    table = {
        "caption": "Best of 3.",
        "columns": ["settings", "train loss"],
        "rows": [["lr 1", "7"]],
    }
    more = {"question": "Which is best?", "comparison": table, "claims": ["It is: it was."]}
    header = synthetic.HEADER | more | {"shown": ["adam"]}
    records.write_header(folder / "made-up", header)


def _damaged(folder):
    (folder / "made-up" / "records" / "part-00001.parquet").write_bytes(b"PAR1 torn")


def _damaged_matrices(folder):
    for path in (folder / "made-up" / "matrices").glob("*.npz"):
        path.write_bytes(b"torn")


def _no_header(folder):
    (folder / "made-up" / "header.json").unlink()


def _no_matrices(folder):
    shutil.rmtree(folder / "made-up" / "matrices")


STATES = {
    name.removeprefix("_"): state
    for name, state in list(globals().items())
    if callable(state) and getattr(state, "__module__", "") == __name__ and name[0] == "_"
}


@pytest.fixture
def in_state(results, tmp_path, monkeypatch):
    """Return a function that puts a copy of the results into a state and points the app at it."""

    def put(name):
        folder = tmp_path / "results"
        shutil.copytree(results, folder)
        STATES[name](folder)
        monkeypatch.setenv("KRONSCOPE_RESULTS", str(folder))
        return folder

    return put
