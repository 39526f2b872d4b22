"""Searches whose processes are killed, or that several processes share."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import optuna
import pytest
from loky.process_executor import TerminatedWorkerError
from optuna.trial import TrialState

from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import trials
from kronscope.studies.training.workers import shared_pool
from kronscope.studies.tuning import run as tuning
from kronscope.studies.tuning.searches import Grid, Halving

SMALL = "digits-autoencoder-small"
HALVING = Halving(SMALL, "adam", epochs=4, trials=6)
LONG = Grid(SMALL, "adam", epochs=20, lr_factors=(0.5, 1.0), workers=1)


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
    before = searching.finished(searching.found(LONG, folder))
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
    assert {number: searching.finished(ended)[number] for number in before} == before
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


@pytest.mark.usefixtures("in_this_process")
def test_a_worker_without_work_does_nothing(searching, tmp_path):
    search = dataclasses.replace(HALVING, epochs=1, trials=1)
    folder = searching.run(search, tmp_path)
    before = searching.found(search, folder)
    tuning.work(search, folder)
    assert searching.found(search, folder) == before
