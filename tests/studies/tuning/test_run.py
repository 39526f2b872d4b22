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
from pathlib import Path

import numpy as np
import optuna
import pytest
from loky.process_executor import TerminatedWorkerError
from optuna.trial import TrialState

from kronscope.studies.cli import main as cli
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import trials
from kronscope.studies.training.workers import shared_pool
from kronscope.studies.tuning import grids
from kronscope.studies.tuning import run as tuning
from kronscope.studies.tuning.searches import Grid, Halving

SMALL = "digits-autoencoder-small"
GRID = Grid(SMALL, "kfac", epochs=1, lr_factors=(0.1, 1.0), damping_factors=(1.0, 10.0))
HALVING = Halving(SMALL, "adam", epochs=4, trials=6)
LONG = Grid(SMALL, "adam", epochs=20, lr_factors=(0.5, 1.0), workers=1)


@pytest.fixture(scope="module")
def grid_run(searching, tmp_path_factory):
    return searching.run(GRID, tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def halving_run(searching, tmp_path_factory):
    return searching.run(HALVING, tmp_path_factory.mktemp("results"))


def finished(trials):
    return {t.number: t.datetime_complete for t in trials if t.state.is_finished()}


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
    before = finished(searching.found(GRID, grid_run))
    wider = dataclasses.replace(GRID, lr_factors=(0.1, 1.0, 3.0), damping_factors=(1.0,))
    assert searching.run(wider, grid_run.parent, grid_run) == grid_run
    found = searching.found(wider, grid_run)
    assert [trial.state.name for trial in found] == ["COMPLETE"] * 5
    assert len(before) == 4
    assert finished(found[:4]) == before


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


def wait_until_one_trains(results):
    """Look into the database until a running trial has reported a loss; the run's folder."""
    query = "select 1 from trials join trial_intermediate_values using (trial_id) where state = ?"
    for _ in range(6000):
        for path in results.glob(f"*/{tuning.DATABASE}"):
            with closing(sqlite3.connect(path, timeout=60)) as database:
                try:
                    if database.execute(query, ("RUNNING",)).fetchone():
                        return path.parent
                except sqlite3.OperationalError:  # no tables yet
                    continue
        time.sleep(0.02)
    pytest.fail("no trial came to train")


def kill_what_trains(searching, results, processes):
    """Kill workers, and age their heartbeats when all other trials have ended; how many trained."""
    folder = wait_until_one_trains(results)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    dead = {t.number for t in searching.found(LONG, folder) if t.state.name == "RUNNING"}
    while left := {t.number for t in searching.found(LONG, folder) if not t.state.is_finished()}:
        if left == dead or not left & dead:  # the second on a machine that is slower than GRACE
            break
        time.sleep(0.02)
    searching.age_heartbeats(folder)
    return len(dead)


def test_a_trial_whose_worker_was_killed_is_retried(searching, tmp_path):
    processes = [shared_pool(LONG.workers).submit(os.getpid).result()]  # one kill ends the pool
    with ThreadPoolExecutor(1) as beside:
        kills = beside.submit(kill_what_trains, searching, tmp_path, processes)
        folder = searching.run(LONG, tmp_path)
    found = searching.found(LONG, folder)
    killed = [t for t in found if t.state.name == "FAIL"]
    assert len(killed) == kills.result() >= 1
    for trial in killed:
        (again,) = [t for t in found if t.system_attrs.get("retry_history") == [trial.number]]
        assert (again.state.name, again.params) == ("COMPLETE", trial.params)
    complete = [t for t in found if t.state.name == "COMPLETE"]
    assert len(complete) == len({t.params["lr"] for t in complete}) == 2
    frame = records.read(folder)
    assert frame.groupby("optimizer")["epoch"].agg(list).map(len).tolist() == [2 * 21] * 2
    assert records.read_header(folder)["status"] == "finished"


ONE_PROCESS = """
import sys
from kronscope.studies.cli import main
from kronscope.studies.tuning import run
run.results_of = lambda work, jobs, _: ((job, work(*job)) for job in jobs)
main.main()
"""


def in_another_process(search, results):
    """The search as a command that trains in its own process."""
    factors = ",".join(f"{factor:g}" for factor in search.lr_factors)
    words = ["tune", "grid", search.problem, "--optimizer", search.optimizer]
    words += ["--epochs", search.epochs, "--lr-factors", factors, "--results", results]
    command = [sys.executable, "-c", ONE_PROCESS, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL)


def test_a_killed_search_goes_on_beside_a_worker_of_another_command(searching, tmp_path):
    other = in_another_process(LONG, tmp_path)
    folder = wait_until_one_trains(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    before = finished(searching.found(LONG, folder))
    assert write_report(folder).is_file()
    searching.age_heartbeats(folder)
    with ThreadPoolExecutor(1) as beside:
        helped = beside.submit(lambda: [tuning.work(LONG, folder) for _ in range(2)])
        searching.run(LONG, tmp_path, folder)
    helped.result()
    ended = searching.found(LONG, folder)
    complete = [trial for trial in ended if trial.state.name == "COMPLETE"]
    assert len(complete) == len({trial.params["lr"] for trial in complete}) == 2
    assert any(trial.system_attrs.get("retry_history") for trial in complete)
    assert {number: finished(ended)[number] for number in before} == before
    assert records.read_header(folder)["status"] == "finished"


@pytest.mark.parametrize("epochs", [[0, 1, 2], [0]])  # it learns of it in a report, or at the end
def test_only_a_trial_whose_heartbeat_is_missed_is_taken_for_dead(
    searching, tmp_path, monkeypatch, epochs
):
    """A worker that was only asleep leaves its trial to others and goes on."""
    search, seen = dataclasses.replace(HALVING, trials=2, epochs=2), []
    study = tuning.open_study(search, tmp_path)

    def asleep(_):
        for age in (lambda _: None, searching.age_heartbeats):
            age(tmp_path)
            tuning.enqueue(study, search.points())
            seen.append([t.state.name for t in searching.found(search, tmp_path)])
        for epoch in epochs:
            place = {"step": epoch, "epoch": epoch, "seconds": 0.0}
            yield [place | {"metric": "train_loss", "value": 1.0}]

    monkeypatch.setattr(trials, "epochs", asleep)
    tuning.enqueue(study, search.points())
    tuning.work(search, tmp_path)
    assert seen == [["RUNNING", "WAITING"], ["FAIL", "WAITING", "WAITING"]]
    found = searching.found(search, tmp_path)
    assert [trial.state.name for trial in found] == seen[1]
    assert tuning.point_of(found[2]) == tuning.point_of(found[0]) == search.points()[0]


def test_an_interrupted_or_broken_training_is_trained_again(searching, tmp_path, monkeypatch):
    points = HALVING.points()[:1]
    tuning.enqueue(tuning.open_study(HALVING, tmp_path), points)
    for error in (KeyboardInterrupt(), ValueError("no device 'cuda'")):
        monkeypatch.setattr(trials, "epochs", lambda _, error=error: (_ for _ in ()).throw(error))
        with pytest.raises(type(error)):
            tuning.work(HALVING, tmp_path)
        tuning.enqueue(tuning.open_study(HALVING, tmp_path), points)
    found = searching.found(HALVING, tmp_path)
    assert [trial.state.name for trial in found] == ["FAIL", "FAIL", "WAITING"]
    assert [tuning.point_of(trial) for trial in found] == points * 3


def test_a_surplus_trial_trains_nothing(searching, tmp_path, monkeypatch):
    """Two commands have enqueued one point, and a worker finds the queue empty after its look."""
    monkeypatch.setattr(trials, "epochs", lambda _: pytest.fail("it trained"))
    study = tuning.open_study(HALVING, tmp_path)
    for _ in range(2):
        study.enqueue_trial({"lr": 0.01})
    study.add_trial(optuna.create_trial(params={}, distributions={}, state=TrialState.WAITING))
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.ask()  # the first trains elsewhere
    for _ in range(2):
        tuning.work(HALVING, tmp_path)
    states = [trial.state.name for trial in searching.found(HALVING, tmp_path)]
    assert states == ["RUNNING", "FAIL", "FAIL"]


def test_workers_never_take_the_same_trial(tmp_path):
    points, taken = [{"lr": 0.01 * k} for k in range(1, 33)], []
    tuning.enqueue(tuning.open_study(HALVING, tmp_path), points)

    def work(_):
        storage = tuning._storage.__wrapped__(tmp_path)  # a connection of its own
        study = optuna.load_study(study_name=HALVING.NAME, storage=storage)
        study.optimize(lambda trial: float(taken.append(trial.number) or 0), n_trials=8)

    with ThreadPoolExecutor(4) as workers:
        list(workers.map(work, range(4)))
    assert sorted(taken) == list(range(32))


def test_workers_that_keep_dying_end_the_search(searching, tmp_path, monkeypatch):
    calls = []

    def dies(*_):
        calls.append(1)
        raise TerminatedWorkerError("killed")

    monkeypatch.setattr(tuning, "results_of", dies)
    with pytest.raises(TerminatedWorkerError):
        searching.run(HALVING, tmp_path)
    assert len(calls) == tuning.DEATHS
    (folder,) = tmp_path.iterdir()
    assert records.read_header(folder)["status"] == "failed: killed"
    found = searching.found(HALVING, folder)
    assert [trial.state.name for trial in found] == ["WAITING"] * 6
    assert [tuning.point_of(trial) for trial in found] == HALVING.points()


def test_a_worker_without_work_does_nothing(searching, halving_run):
    before = searching.found(HALVING, halving_run)
    tuning.work(HALVING, halving_run)
    assert searching.found(HALVING, halving_run) == before


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
