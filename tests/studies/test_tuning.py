"""Searches for lr and damping: against direct training, killed, shared, diverging."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import optuna
import pytest
import torch
from loky.process_executor import TerminatedWorkerError
from rich.progress import Progress

from kronscope.studies.experiments import optimizers_compared
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import trials
from kronscope.studies.tuning import queue as tuning
from kronscope.studies.tuning.searches import Grid, Halving

SMALL = "digits-autoencoder-small"
GRID = Grid(SMALL, "kfac", epochs=1, lr_factors=(0.1, 1.0), damping_factors=(1.0, 10.0))
HALVING = Halving(SMALL, "adam", epochs=4, trials=6)


def run(search, results, resume=None):
    with Progress(disable=True) as progress:
        return tuning.run(search, results, progress, resume)


def found(folder):
    storage = f"sqlite:///{folder / tuning.DATABASE}"
    return optuna.load_study(study_name=tuning.STUDY, storage=storage).get_trials()


def states(folder):
    return [trial.state.name for trial in found(folder)]


@pytest.fixture(scope="module")
def grid_run(tmp_path_factory):
    return run(GRID, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def halving_run(tmp_path_factory):
    return run(HALVING, tmp_path_factory.mktemp("results"))


@pytest.fixture
def in_float32():  # the initialisation draws in the default dtype
    threads = torch.get_num_threads()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("in_float32")
def test_the_grid_finds_what_training_its_points_gives(grid_run):
    compared = optimizers_compared.Grid(
        SMALL, epochs=1, lr_factors=GRID.lr_factors, damping_factors=GRID.damping_factors
    )
    points = optimizers_compared.candidates(compared, "kfac")
    losses = [
        run.loc[(run["epoch"] == 1) & (run["metric"] == "train_loss"), "value"].item()
        for run in map(trials.train, points)
    ]
    best = points[int(np.argmin(losses))]
    assert records.read_header(grid_run)["best"] == dict(best.settings)
    assert sorted(trial.value for trial in found(grid_run)) == pytest.approx(
        sorted(losses), rel=1e-4
    )  # approximately, as the workers may add in another order


def test_no_point_of_the_grid_is_done_twice(grid_run):
    assert states(grid_run) == ["COMPLETE"] * 4
    assert len({tuple(trial.params.items()) for trial in found(grid_run)}) == 4
    assert len(list((grid_run / "records").iterdir())) == 4
    frame = records.read(grid_run)
    assert frame.groupby("optimizer")["epoch"].agg(set).tolist() == [{0, 1}] * 4
    assert set(frame["study"]) == {"tune_grid"}


def test_a_finished_grid_grows_and_is_not_done_again(grid_run):
    before = {trial.number: trial.datetime_complete for trial in found(grid_run)}
    wider = dataclasses.replace(GRID, lr_factors=(0.1, 1.0, 3.0), damping_factors=(1.0,))
    assert run(wider, grid_run.parent, grid_run) == grid_run
    assert states(grid_run) == ["COMPLETE"] * 5
    after = {trial.number: trial.datetime_complete for trial in found(grid_run)}
    assert {number: after[number] for number in before} == before


def test_halving_stops_the_worse_early(halving_run):
    ended = found(halving_run)
    assert {trial.state.name for trial in ended} == {"COMPLETE", "PRUNED"}
    assert len(ended) == 6
    epochs = [trial.last_step for trial in ended]
    assert set(epochs) <= {1, 3, 4}  # the looks are after 1 and 3 epochs
    assert sum(epochs) < 6 * 4 * 0.75
    best = min(trial.value for trial in ended)
    assert any(trial.value == best and trial.state.name == "COMPLETE" for trial in ended)
    frame = records.read(halving_run)
    kept = frame.groupby("optimizer")["epoch"].max()
    assert sorted(kept) == sorted(epochs)
    assert set(frame["metric"]) == {"train_loss", "test_loss"}


def test_table_and_report(halving_run):
    header = records.read_header(halving_run)
    assert header["status"] == "finished"
    table = header["comparison"]
    assert table["columns"][:3] == ["settings", "epochs", "train loss"]
    assert len(table["rows"]) == 6
    assert table["rows"][0][1] == "4"
    losses = [float(row[2]) for row in table["rows"]]
    assert losses == sorted(losses)
    assert {row[-1] for row in table["rows"]} == {"–", "stopped early"}
    assert header["best"] == {"lr": min(found(halving_run), key=lambda t: t.value).params["lr"]}
    assert "6 of 6 with the least training loss (" in table["caption"]
    text = write_report(halving_run).read_text()
    assert all(cell in text for row in table["rows"] for cell in row)
    drawn = {path.name for path in (halving_run / "figures").glob("*.png")}
    assert drawn == {"loss-epoch.png", "loss-seconds.png"}


def test_more_trials_begin_with_the_same_points(halving_run):
    points = HALVING.points()
    assert dataclasses.replace(HALVING, trials=9).points()[:6] == points
    assert dataclasses.replace(HALVING, seed=1).points() != points
    assert all(0.0003 <= point["lr"] <= 0.3 for point in points)
    run(dataclasses.replace(HALVING, trials=7), halving_run.parent, halving_run)
    assert len(found(halving_run)) == 7
    assert {"COMPLETE", "PRUNED"} == set(states(halving_run))


def test_a_clipped_optimizer_draws_its_clip():
    search = Halving(SMALL, "eva", lr_factors=(0.1, 10.0), damping_factors=(1.0, 1.0), trials=5)
    for point in search.points():
        assert set(point) == {"kl_clip", "damping"}
        assert 1e-4 <= point["kl_clip"] <= 1.0
        assert point["damping"] == 0.03
        assert dict(search.trial(point).settings)["lr"] == 0.1


def test_divergence_is_infinitely_bad_and_says_why(tmp_path):
    search = Grid(SMALL, "sgd", epochs=1, lr_factors=(1e5,), workers=1)
    folder = run(search, tmp_path)
    header = records.read_header(folder)
    assert (header["status"], header["best"]) == ("finished", None)
    assert header["comparison"]["rows"][0][-1].startswith("training diverged at step")
    write_report(folder)
    run(dataclasses.replace(search, lr_factors=(1.0, 1e5)), tmp_path, folder)
    wild, mild = found(folder)
    assert wild.value == np.inf
    assert "training diverged" in wild.user_attrs["ended"]
    assert wild.intermediate_values == {1: np.inf}
    assert mild.value < np.inf
    header = records.read_header(folder)
    assert header["best"] == {"lr": 0.01, "momentum": 0.9}
    assert [row[0] for row in header["comparison"]["rows"]] == ["lr 0.01*", "lr 1000*"]
    assert "1 trained to the end, 1 diverged" in header["comparison"]["caption"]


def wait_for_states(results, *wanted):
    """Look into the database until trials are in these states; the run's folder."""
    for _ in range(3000):
        for path in results.glob(f"*/{tuning.DATABASE}"):
            with closing(sqlite3.connect(path, timeout=60)) as database:
                try:
                    rows = database.execute("select state from trials").fetchall()
                except sqlite3.OperationalError:  # no tables yet
                    continue
            if set(wanted) <= {state for (state,) in rows}:
                return path.parent
        time.sleep(0.05)
    pytest.fail(f"the other process came to no {wanted}")


def in_another_process(search, results):
    """The search as a command in a process group of its own, with one worker."""
    factors = ",".join(f"{factor:g}" for factor in search.lr_factors)
    words = ["tune", "grid", search.problem, "--optimizer", search.optimizer, "--workers", 1]
    words += ["--epochs", search.epochs, "--lr-factors", factors, "--results", results]
    command = [sys.executable, "-m", "kronscope.studies.cli.main", *map(str, words)]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)


@pytest.mark.usefixtures("in_float32")
def test_a_killed_search_goes_on_beside_a_worker_of_another_command(tmp_path):
    search = Grid(SMALL, "adam", epochs=12, lr_factors=(0.1, 0.2, 0.5, 1.0, 2.0, 4.0))
    other = in_another_process(search, tmp_path)
    folder = wait_for_states(tmp_path, "COMPLETE", "RUNNING")
    os.killpg(other.pid, signal.SIGKILL)
    other.wait()
    before = {t.number: t.datetime_complete for t in found(folder) if t.state.is_finished()}
    assert write_report(folder).is_file()

    with ThreadPoolExecutor(1) as beside:
        helped = beside.submit(lambda: [tuning.work(search, folder) for _ in range(2)])
        run(search, tmp_path, folder)
    helped.result()
    ended = found(folder)
    complete = [trial for trial in ended if trial.state.name == "COMPLETE"]
    assert len(complete) == len({trial.params["lr"] for trial in complete}) == 6
    again = [trial for trial in ended if trial.state.name == "FAIL"]  # under way when killed
    assert len(ended) - 6 == len(again) <= 1
    assert {t.number: t.datetime_complete for t in ended if t.number in before} == before
    assert records.read_header(folder)["status"] == "finished"


def test_only_what_nobody_holds_is_taken_for_dead(tmp_path):
    search = dataclasses.replace(HALVING, trials=2)
    study = tuning._open(tmp_path)
    tuning._queue(search, tmp_path, study, search.points())
    alive, dead = study.ask(), study.ask()
    with tuning._lock(tmp_path, str(alive.number)):
        tuning._queue(search, tmp_path, study, search.points())
    assert states(tmp_path) == ["RUNNING", "FAIL", "WAITING"]
    assert found(tmp_path)[2].params == dead.params


def test_workers_that_keep_dying_end_the_search(tmp_path, monkeypatch):
    calls = []

    def dies(*_):
        calls.append(1)
        raise TerminatedWorkerError("killed")

    monkeypatch.setattr(tuning, "_work_off", dies)
    with pytest.raises(TerminatedWorkerError):
        run(HALVING, tmp_path)
    assert len(calls) == tuning.DEATHS
    (folder,) = tmp_path.iterdir()
    assert records.read_header(folder)["status"] == "failed: killed"
    assert states(folder) == ["WAITING"] * 6


def test_a_worker_without_work_does_nothing(halving_run):
    assert tuning.work(HALVING, halving_run) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem": "nonsense"}, "no problem 'nonsense'; known"),
        ({"optimizer": "nonsense"}, "no optimizer 'nonsense'; known"),
        ({"lr_factors": (1.0, 1.0)}, "cannot draw 6 different points between"),
        ({"trials": 0}, "cannot draw 0 different points"),
    ],
)
def test_errors_come_before_a_folder(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(dataclasses.replace(HALVING, **changes), tmp_path)
    assert not list(tmp_path.iterdir())


def test_folders_of_other_searches(halving_run):
    for changes, message in (
        ({"problem": "digits-autoencoder"}, r"holds study and problem .*'tune_halving', 'digits-a"),
        ({"optimizer": "sgd"}, "has optimizer adam, not sgd"),
        ({"epochs": 2}, "has epochs 4, not 2"),
        ({"lr_factors": (0.1, 1.0)}, "has lr_factors"),
    ):
        with pytest.raises(ValueError, match=message):
            run(dataclasses.replace(HALVING, **changes), halving_run.parent, halving_run)
    with pytest.raises(ValueError, match=r"holds study and problem .*'tune_halving'"):
        run(GRID, halving_run.parent, halving_run)


@pytest.mark.parametrize("missing", ["optuna", "filelock"])
def test_without_optuna_the_extra_is_named(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"needs the extra: pip install '.\[tune\]'"):
        run(HALVING, tmp_path)
    assert not list(tmp_path.iterdir())
