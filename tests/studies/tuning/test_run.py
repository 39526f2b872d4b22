"""Results of searches for lr and damping: against direct training, diverging, refused."""

import dataclasses
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from kronscope.studies.cli import main as cli
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import trials
from kronscope.studies.tuning import grids
from kronscope.studies.tuning import run as tuning
from kronscope.studies.tuning.searches import Grid, Halving

SMALL = "digits-autoencoder-small"
GRID = Grid(SMALL, "kfac", epochs=1, lr_factors=(0.1, 1.0), damping_factors=(1.0, 10.0))
HALVING = Halving(SMALL, "adam", epochs=4, trials=6)


@pytest.fixture(scope="module")
def grid_run(searching, tmp_path_factory):
    return searching.run(GRID, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def halving_run(searching, tmp_path_factory):
    return searching.run(HALVING, tmp_path_factory.mktemp("results"))


@pytest.mark.usefixtures("in_float32")
def test_the_grid_finds_what_training_its_points_gives(searching, grid_run):
    factors = GRID.lr_factors, GRID.damping_factors
    points = grids.candidates(SMALL, "kfac", *factors, 0, 1, "cpu")
    losses = [
        run.loc[(run["epoch"] == 1) & (run["metric"] == "train_loss"), "value"].item()
        for run in map(trials.train, points)
    ]
    best = points[int(np.argmin(losses))]
    assert records.read_header(grid_run)["best"] == dict(best.settings)
    assert sorted(trial.value for trial in searching.found(GRID, grid_run)) == pytest.approx(
        sorted(losses), rel=1e-4
    )  # approximately, as the workers may add in another order


@pytest.mark.usefixtures("in_float32", "in_this_process")
def test_trials_are_bit_for_bit_what_training_gives(searching, tmp_path):
    search = dataclasses.replace(HALVING, optimizer="kfac", epochs=2, trials=2)
    folder = searching.run(search, tmp_path)
    frame = records.read(folder)
    for trial in searching.found(search, folder):
        rows = trials.train(search.trial(trial.params))
        rows = rows[rows["epoch"] <= trial.last_step]  # as far as it was not stopped
        own = frame[frame["optimizer"] == search.label(trial.params)]
        assert len(own) == len(rows) >= 4
        for column in ("metric", "epoch", "step", "value"):
            assert own[column].tolist() == rows[column].tolist()
        losses = rows[(rows["metric"] == "train_loss") & (rows["epoch"] > 0)]["value"].tolist()
        assert list(trial.intermediate_values.values()) == losses
        assert trial.value == losses[-1]


def test_no_point_of_the_grid_is_done_twice(searching, grid_run):
    found = searching.found(GRID, grid_run)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 4
    assert len({tuple(trial.params.items()) for trial in found}) == 4
    assert len(list((grid_run / "records").iterdir())) == 4
    frame = records.read(grid_run)
    assert frame.groupby("optimizer")["epoch"].agg(set).tolist() == [{0, 1}] * 4
    assert set(frame["study"]) == {"tune_grid"}


@pytest.mark.usefixtures("in_this_process")
def test_a_finished_grid_grows_and_is_not_done_again(searching, grid_run):
    before = searching.finished(searching.found(GRID, grid_run))
    wider = dataclasses.replace(GRID, lr_factors=(0.1, 1.0, 3.0), damping_factors=(1.0,))
    assert searching.run(wider, grid_run.parent, grid_run) == grid_run
    found = searching.found(wider, grid_run)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 5
    assert len(before) == 4
    assert searching.finished(found[:4]) == before


def test_halving_stops_the_worse_early(searching, halving_run):
    ended = searching.found(HALVING, halving_run)
    assert {trial.state.name for trial in ended} == {"COMPLETE", "PRUNED"}
    assert len(ended) == 6
    epochs = [trial.last_step for trial in ended]
    assert set(epochs) <= {1, 3, 4}  # the rungs are after 1 and 3 epochs
    assert sum(epochs) < 6 * 4 * 0.75
    best = min(trial.value for trial in ended)
    assert any(trial.value == best and trial.state.name == "COMPLETE" for trial in ended)
    frame = records.read(halving_run)
    kept = frame.groupby("optimizer")["epoch"].max()
    assert sorted(kept) == sorted(epochs)
    assert set(frame["metric"]) == {"train_loss", "test_loss"}


def test_table_and_report(searching, halving_run):
    header = records.read_header(halving_run)
    assert header["status"] == "finished"
    table = header["comparison"]
    assert table["columns"][:3] == ["settings", "epochs", "train loss"]
    assert len(table["rows"]) == 6
    assert table["rows"][0][1] == "4"
    losses = [float(row[2]) for row in table["rows"]]
    assert losses == sorted(losses)
    assert {row[-1] for row in table["rows"]} == {"–", "stopped early"}
    best = min(searching.found(HALVING, halving_run), key=lambda t: t.value)
    assert header["best"] == {"lr": best.params["lr"]}
    assert "6 of 6 with the least training loss (" in table["caption"]
    text = write_report(halving_run).read_text()
    assert all(cell in text for row in table["rows"] for cell in row)
    drawn = {path.name for path in (halving_run / "figures").glob("*.png")}
    assert drawn == {"loss-epoch.png", "loss-seconds.png"}


@pytest.mark.usefixtures("in_this_process")
def test_more_trials_begin_with_the_same_points(searching, halving_run):
    points = HALVING.points()
    assert dataclasses.replace(HALVING, trials=9).points()[:6] == points
    assert dataclasses.replace(HALVING, seed=1).points() != points
    assert all(0.0003 <= point["lr"] <= 0.3 for point in points)
    more = dataclasses.replace(HALVING, trials=7)
    searching.run(more, halving_run.parent, halving_run)
    found = searching.found(more, halving_run)
    assert [trial.params for trial in found] == more.points()
    assert {trial.state.name for trial in found} == {"COMPLETE", "PRUNED"}


@pytest.mark.usefixtures("in_this_process")
def test_divergence_is_infinitely_bad_and_says_why(searching, tmp_path):
    search = Grid(SMALL, "sgd", epochs=1, lr_factors=(1e5,))
    folder = searching.run(search, tmp_path)
    header = records.read_header(folder)
    assert (header["status"], header["best"]) == ("finished", None)
    assert header["comparison"]["rows"][0][-1].startswith("training diverged at step")
    write_report(folder)
    searching.run(dataclasses.replace(search, lr_factors=(1.0, 1e5)), tmp_path, folder)
    wild, mild = searching.found(search, folder)
    assert wild.state.name == "COMPLETE"  # a result: it is not tried again
    assert wild.value == np.inf
    assert "training diverged" in wild.user_attrs["ended"]
    assert wild.intermediate_values == {1: np.inf}
    assert mild.value < np.inf
    header = records.read_header(folder)
    assert header["best"] == {"lr": 0.01, "momentum": 0.9}
    assert [row[0] for row in header["comparison"]["rows"]] == ["lr 0.01*", "lr 1000*"]
    assert "1 trained to the end, 1 diverged" in header["comparison"]["caption"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "nonsense"}, "no problem 'nonsense'; known"),
        ({"optimizer": "nonsense"}, "no optimizer 'nonsense'; known"),
        ({"lr_factors": (1.0, 1.0)}, "cannot draw 6 different points between"),
        ({"trials": 0}, "cannot draw 0 different points"),
    ],
)
def test_errors_come_before_a_folder(searching, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        searching.run(dataclasses.replace(HALVING, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_of_other_searches(searching, halving_run):
    for changes, message in (
        ({"problem": "digits-autoencoder"}, r"holds study and problem .*'tune_halving', 'digits-a"),
        ({"optimizer": "sgd"}, "has optimizer adam, not sgd"),
        ({"epochs": 2}, "has epochs 4, not 2"),
        ({"lr_factors": (0.1, 1.0)}, "has lr_factors"),
    ):
        other = dataclasses.replace(HALVING, **changes)
        with pytest.raises(ValueError, match=message):
            searching.run(other, halving_run.parent, halving_run)
    with pytest.raises(ValueError, match=r"holds study and problem .*'tune_halving'"):
        searching.run(GRID, halving_run.parent, halving_run)


def test_a_search_of_an_earlier_version_is_refused_and_left_as_it_was(searching, tmp_path):
    """earlier_search.sql is the database of a search of the version with its own queue."""
    dump = Path(__file__).with_name("earlier_search.sql").read_text()
    with closing(sqlite3.connect(tmp_path / tuning.DATABASE)) as database:
        database.executescript(dump)
    search = Grid(SMALL, "adam", epochs=1, lr_factors=(0.5, 1.0))
    header = {"study": "tune_grid", "problem": SMALL, "config": dataclasses.asdict(search)}
    records.write_header(tmp_path, header | {"status": "finished", "seconds": 1.0})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=r"earlier version of kronscope.*again without --resume"):
        searching.run(search, tmp_path.parent, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_without_optuna_the_extra_is_named(monkeypatch, capsys, tmp_path):
    for name in ("optuna", "kronscope.studies.tuning.run", "kronscope.studies.tuning.searches"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("kronscope.studies.tuning.run")
    monkeypatch.delattr("kronscope.studies.tuning.searches")
    monkeypatch.setitem(sys.modules, "optuna", None)
    words = ["kronscope", "tune", "halving", SMALL, "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.main()
    assert "needs the extra: pip install '.[tune]'" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())
