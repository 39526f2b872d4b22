"""Every view in every state of the results folder: a helpful page, never a traceback."""

import json
import os
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from streamlit.testing.v1 import AppTest

from kronscope.studies.reports import figures
from kronscope.studies.results import records
from tests import synthetic

APP = Path(__file__).parents[2] / "app"
VIEWS = sorted(file.stem for file in (APP / "views").glob("[!_]*.py"))
STATES = {  # state -> what every view says in it, number of figures
    "full": ("", 1),
    "empty": ("No runs in", 0),
    "missing": ("No runs in", 0),
    "just_started": ("No records in this run yet", 0),
    "running": ("still going", 1),
    "diverged": ("diverged: the loss is not finite at step 60", 1),
    "damaged": ("part-00001.parquet", 1),
    "no_header": ("header.json is missing or damaged", 1),
}


def open_view(name):
    app = AppTest.from_file(str(APP / "views" / f"{name}.py"), default_timeout=60)
    return app.run()


def said(app):
    return "\n".join(box.value for box in [*app.info, *app.warning])


def figures_shown(app):
    return len(app.get("image"))


def test_all_views_are_there():
    assert len(VIEWS) >= 3


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("view", VIEWS)
def test_every_view_explains_every_state_and_draws_what_there_is(view, state, in_state):
    in_state(state)
    text, figures = STATES[state]
    app = open_view(view)
    assert not app.exception
    assert len(app.title) == 1
    assert text in said(app)
    assert text or not said(app)  # where nothing is unusual, nothing is said
    assert figures_shown(app) == figures


@pytest.mark.parametrize(
    ("view", "text", "figures"),
    [("overview", "No verdict yet", 1)]
    + [(view, "This run compares no approximation", 0) for view in ("along_training", "blocks")],
)
@pytest.mark.parametrize("state", ["nothing_compared", "whole_model_only"])
def test_a_run_that_compares_nothing(view, text, figures, state, in_state):
    in_state(state)
    app = open_view(view)
    assert not app.exception
    assert text in said(app)
    assert figures_shown(app) == figures


@pytest.mark.parametrize("view", ["along_training", "blocks"])
def test_a_run_that_has_compared_nothing_yet(view, in_state):
    run = in_state("nothing_compared") / "made-up"
    records.write_header(run, synthetic.HEADER | {"status": "running"})
    app = open_view(view)
    assert not app.exception
    assert "This run has compared nothing yet" in said(app)


def test_overview_shows_the_figures_that_a_study_alone_has(in_state):
    run = in_state("whole_model_only") / "made-up"
    point = {"optimizer": "adam", "kl_clip": float("nan"), "damping": float("nan")}
    point |= {"seeds": 2, "diverged": 1, "steps": [3], "loss": 7.0}
    rows = [point | {"lr": lr} for lr in (0.01, 0.1)]
    more = {"stability": rows, "stable_below": {"adam": 38.0}}
    records.write_header(run, synthetic.HEADER | more)
    app = open_view("overview")
    assert not app.exception
    assert "Figures of this study" in [block.value for block in app.subheader]
    assert figures_shown(app) == 3  # the map, the edge, the loss
    captions = "\n".join(block.value for block in app.caption)
    assert "How many seeds diverged" in captions
    assert "How near each training with adam was to instability" in captions


def test_overview_gives_runs_verdicts_and_definitions(in_state):
    in_state("full")
    app = open_view("overview")
    assert list(app.dataframe[0].value["records"]) == [1062]
    text = "\n".join(block.value for block in app.markdown)
    assert "Exact GGN, kbfgs at step 100" in text
    assert "Exact Hessian, adam at step 100" in text
    columns = json.loads(app.dataframe[1].proto.columns)
    assert "‖B − C‖_F / ‖C‖_F" in columns["relative_error"]["help"]  # the tooltips


@pytest.mark.parametrize("state", ["without_floors", "floors_without_value"])
def test_overview_without_a_noise_floor(state, in_state):
    in_state(state)
    app = open_view("overview")
    assert not app.exception
    assert set(app.dataframe[1].value.index.unique("approximation")) >= {"kfac", "diagonal"}
    assert figures_shown(app) == 1


@pytest.mark.parametrize("view", VIEWS)
def test_a_header_without_definitions(view, in_state):
    in_state("no_definitions")
    app = open_view(view)
    assert not app.exception
    assert figures_shown(app) == 1
    if view == "along_training":
        assert "not defined in the run's header" in app.selectbox(key="metric").help


def test_many_runs_are_counted_not_read(in_state, monkeypatch):
    """However many there are, only the chosen one is read, and that once."""
    folder, read = in_state("full"), []
    for number in range(25):
        shutil.copytree(folder / "made-up", folder / f"run-{number}")
    (folder / "run-3" / "records" / "part-00001.parquet").write_bytes(b"PAR1 torn")
    whole = records.read
    monkeypatch.setattr(records, "read", lambda run: (read.append(run), whole(run))[1])
    app = open_view("overview").run()
    assert not app.exception
    assert len(read) == 1
    shown = app.dataframe[0].value.set_index("run")["records"]
    assert len(shown) == 26
    assert shown["run-3"] == 531
    assert set(shown.drop("run-3")) == {1062}


def test_overview_shows_what_a_study_put_into_the_header(in_state, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        figures,
        "loss_curves",
        lambda frame, x: (drawn.append((set(frame["optimizer"]), x)), Figure())[1],
    )
    in_state("compared")
    app = open_view("overview")
    assert not app.exception
    assert "Comparison" in [block.value for block in app.subheader]
    assert app.dataframe[1].value.to_dict("records") == [{"settings": "lr 1", "train loss": "7"}]
    assert "Best of 3." in [block.value for block in app.caption]
    text = "\n".join(block.value for block in app.markdown)
    assert "Which is best?" in text
    assert "It is: it was." in text
    app.selectbox(key="loss-against").select("epoch").run()
    assert drawn == [({"adam"}, "step"), ({"adam"}, "epoch")]


def test_along_training_keeps_its_choice_in_the_address(in_state):
    in_state("full")
    app = open_view("along_training")
    assert app.selectbox(key="metric").value == "relative_error"
    assert "‖B − C‖_F / ‖C‖_F" in app.selectbox(key="metric").help
    app.selectbox(key="metric").select("step_cosine").run()
    app.selectbox(key="truth").select("hessian").run()
    assert not app.exception
    assert figures_shown(app) == 1
    assert "step_cosine" in app.query_params["metric"]
    assert "hessian" in app.query_params["truth"]
    assert app.selectbox(key="damping").value == "0.3"
    assert "cos((B + λI)⁻¹ g" in app.selectbox(key="metric").help


def test_an_address_is_followed_and_a_wrong_one_ignored(in_state):
    in_state("full")
    app = AppTest.from_file(str(APP / "views" / "along_training.py"), default_timeout=60)
    app.query_params["metric"] = "cosine"
    app.query_params["optimizer"] = "no such optimizer"
    app.run()
    assert not app.exception
    assert app.selectbox(key="metric").value == "cosine"
    assert app.selectbox(key="optimizer").value == "adam"


def test_blocks_shows_the_table_of_the_chosen_block(in_state):
    in_state("full")
    app = open_view("blocks")
    assert app.selectbox(key="block").options[-1] == "layer 10 · d = 3,136"
    app.selectbox(key="optimizer").select("kbfgs").run()
    app.selectbox(key="block").select("10").run()
    assert not app.exception
    table = app.dataframe[0].value
    assert "kbfgs_live" in table.index
    assert " [" in table.loc["kfac", "relative_error"]
    assert "[" not in table.loc["kfac", "cosine"]  # this metric has no interval
    assert "kbfgs_live" in app.selectbox(key="approximation").options


@pytest.mark.parametrize("state", ["no_matrices", "damaged_matrices"])
def test_blocks_without_matrices_still_gives_the_numbers(state, in_state):
    in_state(state)
    app = open_view("blocks")
    assert "No matrices are stored" in said(app)
    assert len(app.dataframe[0].value) == 4


def test_blocks_offers_steps_without_matrices_too(in_state):
    in_state("full")
    app = open_view("blocks")
    assert app.selectbox(key="step").options == ["0", "50", "100"]
    assert app.selectbox(key="step").value == "100"
    app.selectbox(key="step").select("50").run()
    assert not app.exception
    assert "No matrices are stored for this choice" in said(app)
    assert "of adam at 0, 100" in said(app)
    assert figures_shown(app) == 0
    assert "kfac" in app.dataframe[0].value.index


def test_blocks_opens_where_there_is_a_picture(in_state):
    folder = in_state("full")
    for path in (folder / "made-up" / "matrices").glob("*-0-100-*.npz"):
        path.unlink()
    app = open_view("blocks")
    assert app.selectbox(key="step").value == "0"
    assert figures_shown(app) == 1


def test_blocks_shows_matrices_without_records(in_state):
    folder = in_state("full")
    shutil.rmtree(folder / "made-up" / "records")
    row = synthetic.row(optimizer="adam", step=0, metric="train_loss", value=1.0)
    records.append(folder / "made-up", [row])
    app = open_view("blocks")
    assert not app.exception
    assert figures_shown(app) == 1
    assert "Nothing was measured of this layer" in said(app)


def test_new_records_appear_on_the_next_run_of_the_page(in_state, results):
    folder = in_state("just_started")
    app = open_view("overview")
    assert figures_shown(app) == 0
    shutil.copytree(results / "made-up" / "records", folder / "made-up" / "records")
    assert figures_shown(app.run()) == 1


def test_a_run_that_fell_silent_is_said_to_be(in_state):
    run = in_state("running") / "made-up"
    for folder in (run, run / "records", run / "matrices"):
        os.utime(folder, (0, 0))
    assert "may have been killed" in said(open_view("blocks"))


def test_the_folder_given_may_be_one_run(in_state, monkeypatch):
    monkeypatch.setenv("KRONSCOPE_RESULTS", str(in_state("full") / "made-up"))
    assert figures_shown(open_view("overview")) == 1


def test_the_entry_opens_the_overview(in_state):
    in_state("full")
    app = AppTest.from_file(str(APP / "main.py"), default_timeout=60).run()
    assert not app.exception
    assert app.title[0].value == "Overview"
    assert figures_shown(app) == 1
