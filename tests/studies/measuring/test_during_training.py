"""Measuring beside a training: within its share of the time, and without a trace in the run."""

import doctest

import pytest
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.experiments import train as runs
from kronscope.studies.measuring import during_training as alongside
from kronscope.studies.measuring.during_training import DuringTraining
from kronscope.studies.results import records
from kronscope.studies.training import loop as training
from tests.pools import in_process

SMALL = problems.get("digits-autoencoder-small")


@pytest.fixture(autouse=True)
def _without_workers():
    with in_process():
        yield


def train(folder, epochs, during=None, resume=None):
    settings = training.Settings(SMALL, "kfac", epochs)
    with Progress(disable=True) as progress:
        return runs.train(settings, folder, progress, resume, during)


def test_measuring_leaves_no_trace_and_resumes(tmp_path):
    plain = train(tmp_path / "plain", 2).frame
    during = DuringTraining(0.999)
    first = train(tmp_path / "measured", 1, during)
    again = DuringTraining(0.999)
    found = train(tmp_path, 2, again, resume=first.folder)
    own = found.frame[found.frame["block"] == ""]
    assert list(own["value"]) == list(plain["value"])
    assert list(own["step"]) == list(plain["step"]) == [0, 0, 10, 10, 20, 20]
    measured = found.frame[found.frame["block"] != ""]
    assert set(measured["step"]) == {10, 20}
    assert {"kfac", "kfac_live", "kfac_live_undamped"} <= set(measured["approximation"])
    assert set(measured["block"]) == {"0", "2", "4", "5", "7", "9"}
    assert (during.taken, again.taken, again.left_out) == (1, 2, 0)
    assert again.seconds > during.seconds > 0
    header = records.read_header(first.folder)
    assert header["measuring"] == again.counters()
    assert "relative_error" in header["metrics"]
    assert found.measuring.startswith("measured 2 time(s) in ")
    assert first.measuring != found.measuring


def test_what_would_take_too_much_is_left_out(monkeypatch):
    clock = iter(range(0, 10000, 10))  # a measurement takes 10 s
    monkeypatch.setattr(alongside.time, "perf_counter", lambda: next(clock))
    row = {"metric": "relative_error"}
    found = type("Found", (), {"rows": [row], "left_out": []})
    monkeypatch.setattr(alongside.snapshots, "take", lambda *_, **__: None)
    monkeypatch.setattr(alongside.snapshots, "measure_all", lambda *_, **__: [found])
    during = DuringTraining(0.25)
    state = type("TrainingState", (), {"seconds": 0.0})
    taken = []
    for seconds in range(10, 130, 10):
        state.seconds = float(seconds)
        if during.rows(None, state, {}):
            taken.append(seconds)
            spent = during.seconds / (during.seconds + seconds)
            assert spent <= 0.25 or len(taken) == 1
    assert taken == [10, 60, 90, 120]
    assert during.summary(120.0) == (
        "measured 4 time(s) in 25.0% of the run's time, left out 8 time(s) to stay within 25%"
    )


def test_copying_counts_as_measuring(monkeypatch):
    """The copy takes 7 s, the measurement 2 s."""
    now = [0.0]

    def takes(seconds, result):
        now[0] += seconds
        return result

    found = type("Found", (), {"rows": [{"metric": "cosine"}], "left_out": []})
    monkeypatch.setattr(alongside.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(alongside.snapshots, "take", lambda *_, **__: takes(7.0, None))
    monkeypatch.setattr(alongside.snapshots, "measure_all", lambda *_, **__: takes(2.0, [found]))
    during = DuringTraining(0.5)
    state = type("TrainingState", (), {"seconds": 10.0})
    assert during.rows(None, state, {})
    assert during.counters() == {"seconds": 9.0, "last": 9.0, "taken": 1, "left_out": 0}
    assert during.rows(None, state, {}) == []  # 18 of 28 s would be more than half
    assert during.summary(10.0).startswith("measured 1 time(s) in 47.4% of the run's time")


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 20.0])
def test_refusals(share):
    with pytest.raises(ValueError, match=r"takes a share in \(0, 1\) of a run's time, not"):
        DuringTraining(share)


def test_examples_in_docstrings():
    found = doctest.testmod(alongside)
    assert found.failed == 0 < found.attempted


@pytest.mark.parametrize(
    ("name", "optimizer", "left_out"),
    [
        ("cifar10-resnet32-small", "kfac", "3.norm1"),
        ("sequential-mnist-lstm-small", "adam", "lstm1, lstm2, lstm3"),
    ],
)
def test_blocks_that_are_no_matrix_are_left_out_by_name(tmp_path, name, optimizer, left_out):
    during = DuringTraining(0.9)
    settings = training.Settings(problems.get(name), optimizer, 1)
    with Progress(disable=True) as progress:
        outcome = runs.train(settings, tmp_path, progress, during=during)
    assert f"{left_out}" in outcome.measuring
    assert "they are no matrix [W, b]" in outcome.measuring
    measured = set(outcome.frame["block"]) - {""}
    assert measured
    assert not measured & set(during.not_measured)
