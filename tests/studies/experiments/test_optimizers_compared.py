"""The comparison of optimizers, run in tiny grids, and its table against numbers by hand."""

import dataclasses
import doctest
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from rich.progress import Progress

from kronscope.optim import NumericalError
from kronscope.studies import problems
from kronscope.studies.experiments import _published as published
from kronscope.studies.experiments import optimizers_compared as study
from kronscope.studies.reports import comparison_tables as comparison
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import loop as training
from kronscope.studies.training import optimizers, trials
from tests.paths import REFERENCE
from tests.pools import in_process

SMALL = problems.get("digits-autoencoder-small")


def run(grid, results, resume=None):
    with Progress(disable=True) as progress:
        return study.run(grid, results, progress, resume)


@pytest.fixture(scope="module", autouse=True)
def _without_workers():
    with in_process():
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(study.TINY, tmp_path_factory.mktemp("results"))


def test_the_records_are_those_of_the_best_settings(done):
    frame = records.read(done)
    assert frame.attrs["damaged"] == []
    assert set(frame["optimizer"]) == {"kfac", "adam"}
    assert set(frame["step"]) == {0, 10, 20}
    assert set(frame["metric"]) == {"train_loss", "test_loss"}
    assert set(frame["study"]) == {study.NAME}
    last = frame[(frame["step"] == 20) & (frame["metric"] == "train_loss")]
    for name, value in zip(last["optimizer"], last["value"], strict=True):
        candidates = study.candidates(study.TINY, name)
        assert len(candidates) == 2
        assert value == min(trials.loss_at_the_end(done, trial) for trial in candidates)


def test_a_trial_is_what_training_does(done):
    """The very numbers again; approximately, as the workers may add in another order."""
    (trial, _) = study.candidates(study.TINY, "adam")
    assert dict(trial.settings) == {"lr": 0.003}
    torch.set_default_dtype(torch.float32)  # the initialisation draws in the default dtype
    try:
        settings = training.Settings(SMALL, "adam", 2, hyper={"lr": 0.003})
        *_, state = training.steps(settings)
        losses = training.evaluate(state, SMALL)
    finally:
        torch.set_default_dtype(torch.float64)
    found = trials.read(done, trial)
    ends = found[found["step"] == 20].set_index("metric")["value"]
    assert ends["train_loss"] == pytest.approx(losses["train_loss"], rel=1e-4)
    assert ends["test_loss"] == pytest.approx(losses["test_loss"], rel=1e-4)


def test_the_yardstick_has_its_longer_budget(done):
    (own,) = study.yardsticks(study.TINY, [0])
    for trial in own:
        assert trial.optimizer == "sgd"
        assert trials.read(done, trial)["epoch"].max() == 6


def test_header_and_report(done):
    header = records.read_header(done)
    assert header["status"] == "finished"
    assert header["question"].startswith("How fast does each optimizer train")
    table = header["comparison"]
    assert table["columns"][:3] == ["optimizer", "settings", "train loss"]
    assert "test acc." not in table["columns"]  # an autoencoder has none
    assert sorted(row[0] for row in table["rows"]) == ["adam", "kfac"]
    losses = [float(row[2]) for row in table["rows"]]
    assert losses == sorted(losses)
    text = write_report(done).read_text()
    assert "How fast does each optimizer train" in text
    assert "How wrong is each approximation" not in text
    assert all(cell in text for row in table["rows"] for cell in row[:3])
    drawn = {path.name for path in (done / "figures").glob("*.png")}
    assert drawn == {"loss-epoch.png", "loss-seconds.png"}


def test_what_is_done_is_not_done_again(tmp_path):
    grid = dataclasses.replace(study.TINY, optimizers=("adam",), epochs=1, longer=1)
    folder = run(grid, tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in (folder / "trials").iterdir()}
    assert len(stamps) == 4
    more = dataclasses.replace(grid, optimizers=("adam", "sgd"), seeds=2)
    assert run(more, tmp_path, resume=folder) == folder
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list((folder / "trials").iterdir())) == 7
    seeds = records.read(folder).groupby("optimizer")["seed"].agg(set)
    assert seeds["adam"] == seeds["sgd"] == {0, 1}
    longer = dataclasses.replace(grid, epochs=2)
    run(longer, tmp_path, resume=folder)
    again = [path for path in stamps if path.stat().st_mtime_ns != stamps[path]]
    assert len(again) == 4
    assert records.read(folder).groupby("optimizer")["epoch"].max()["adam"] == 2


def test_a_tuning_shorter_than_the_final_runs(tmp_path):
    grid = dataclasses.replace(study.TINY, optimizers=("adam",), tune_epochs=1, longer=1)
    folder = run(grid, tmp_path)
    tried = study.candidates(grid, "adam")
    after_one = [trials.loss_at_the_end(folder, trial) for trial in tried]
    lengths = [trials.read(folder, dataclasses.replace(t, epochs=9))["epoch"].max() for t in tried]
    best = int(np.argmin(after_one))
    assert [lengths[best], lengths[1 - best]] == [2, 1]
    assert records.read(folder).query("optimizer == 'adam'")["epoch"].max() == 2
    table = records.read_header(folder)["comparison"]
    assert table["caption"].startswith("After 2 epochs, tuned by 1, at the settings that were")


def test_divergence_is_infinitely_bad_and_no_error(tmp_path):
    grid = dataclasses.replace(
        study.TINY, optimizers=("sgd",), epochs=1, longer=1, lr_factors=(1.0, 1e5)
    )
    folder = run(grid, tmp_path)
    mild, wild = study.candidates(grid, "sgd")
    assert trials.loss_at_the_end(folder, wild) == np.inf
    assert "training diverged" in trials.read(folder, wild)["ended"].iloc[0]
    assert trials.loss_at_the_end(folder, mild) < np.inf
    ((name, settings, *_),) = records.read_header(folder)["comparison"]["rows"]
    assert (name, settings) == ("sgd", "lr 0.01*")
    only_wild = dataclasses.replace(grid, lr_factors=(1e5,))
    run(only_wild, tmp_path, resume=folder)
    header = records.read_header(folder)
    assert header["status"] == "finished"
    ((_, settings, loss, *_),) = header["comparison"]["rows"]
    assert settings.startswith("lr 1000: training diverged at step")
    assert loss == "∞"
    write_report(folder)


def test_spares_come_in_for_what_diverged(tmp_path, monkeypatch):
    grid = dataclasses.replace(
        study.TINY, optimizers=("adam", "sgd"), seeds=2, spares=2, epochs=1, longer=1
    )
    ends = {("adam", seed): 3.0 for seed in range(4)} | {("sgd", 0): np.inf, ("sgd", 1): 2.0}
    ends |= {("sgd", 2): np.inf, ("sgd", 3): 1.0}
    asked = []

    def complete(_, wanted, *_rest):
        asked.extend((t.optimizer, t.seed) for t in wanted)

    monkeypatch.setattr(trials, "complete_all", complete)
    monkeypatch.setattr(
        trials, "loss_at_the_end", lambda _, trial: ends[trial.optimizer, trial.seed]
    )
    monkeypatch.setattr(trials, "record", lambda *_: None)
    tuned = {name: study.candidates(grid, name)[0] for name in grid.optimizers}
    finals = study.train_best(grid, tmp_path, tuned, None)
    assert ("adam", 2) not in asked
    assert ("sgd", 3) in asked
    assert ([t.seed for t in finals["sgd"].trials], finals["sgd"].tried) == ([1, 3], 4)
    assert ([t.seed for t in finals["adam"].trials], finals["adam"].tried) == ([0, 1], 2)
    ends["sgd", 3] = np.inf  # there are no more spares: what diverged is shown
    finals = study.train_best(grid, tmp_path, tuned, None)
    assert ([t.seed for t in finals["sgd"].trials], finals["sgd"].tried) == ([0, 1], 4)


def test_published_curves_stand_beside_ours(tmp_path, monkeypatch):
    curve = published.Curve("a paper", 9, train_loss=[20.0], test_loss=[21.0, 19.0])
    monkeypatch.setattr(published, "curves", lambda _: {"adam": curve})
    grid = dataclasses.replace(study.TINY, optimizers=("adam", "sgd"), lr_factors=(1.0,), longer=1)
    folder = run(grid, tmp_path)
    frame = records.read(folder)
    drawn = frame[frame["optimizer"] == "adam, published"]
    assert drawn["seconds"].isna().all()
    points = drawn[["metric", "step", "value"]].itertuples(index=False, name=None)
    assert sorted(points) == [
        ("test_loss", 10, 21.0),
        ("test_loss", 20, 19.0),
        ("train_loss", 10, 20.0),
    ]
    table = records.read_header(folder)["published"]
    assert table["columns"] == ["optimizer", "run", "epoch 1", "epoch 2"]
    printed, ours = table["rows"]
    assert printed == ["adam", "published", "20.0", "–"]
    assert ours[:2] == ["adam", "ours, 1 seed(s)"]
    loss = frame[
        (frame["optimizer"] == "adam") & (frame["metric"] == "train_loss") & (frame["step"] == 10)
    ]["value"].item()
    assert ours[2] == f"{loss:.1f} ({100 * (loss / 20 - 1):+.1f} %)"
    text = write_report(folder).read_text()
    assert "Beside published curves" in text
    assert "adam, published" in text


def test_the_published_curves_are_those_of_the_reference():
    known = json.loads((REFERENCE / "curves.json").read_text())["runs"]
    runs = {run["id"]: run for run in known}
    names = {"kbfgs": "kbfgs_demo/K-BFGS", "kfac": "kbfgs_demo/KFAC", "sgd": "tnt_demo/MNIST/SGD-m"}
    names |= {name.lower(): f"tnt_demo/MNIST/{name}" for name in ("TNT", "Shampoo", "Adam")}
    found = published.curves("mnist-autoencoder")
    assert set(found) == set(names)
    for name, curve in found.items():
        assert curve.train_loss == runs[names[name]]["train_loss"][:100]
        assert curve.test_loss == runs[names[name]]["test_loss"][:100]
    assert published.curves("digits-autoencoder") == {}


def test_errors_are_written_down_and_raised(tmp_path):
    grid = dataclasses.replace(study.TINY, optimizers=("nonsense",))
    with pytest.raises(ValueError, match="no optimizer 'nonsense'; known"):
        run(grid, tmp_path)
    (folder,) = tmp_path.iterdir()
    assert records.read_header(folder)["status"].startswith("failed: no optimizer 'nonsense'")
    other = dataclasses.replace(grid, problem="digits-autoencoder")
    with pytest.raises(ValueError, match=r"holds study and problem .*'digits-autoencoder-small'"):
        run(other, tmp_path, resume=folder)


def fails(error, after):
    def steps(_):
        for step in range(after + 1):
            place = {"step": step, "epoch": step / 2, "seconds": 0.0, "first": None}
            yield SimpleNamespace(steps_per_epoch=2, **place)
        raise error

    return steps


def test_what_comes_up_in_the_numbers_counts_as_divergence_and_nothing_else(monkeypatch):
    trial = trials.trial(SMALL.name, "kfac", {}, seed=0, epochs=2)
    monkeypatch.setattr(training, "evaluate", lambda *_: {"train_loss": 1.0})
    monkeypatch.setattr(training, "steps", fails(NumericalError("A cannot be inverted"), after=3))
    threads = torch.get_num_threads()
    try:
        found = trials.train(trial)
        assert set(found["ended"]) == {"A cannot be inverted"}
        assert list(found["epoch"]) == [0, 1]
        monkeypatch.setattr(training, "steps", fails(torch.OutOfMemoryError("full"), after=3))
        with pytest.raises(torch.OutOfMemoryError, match="full"):
            trials.train(trial)
        monkeypatch.setattr(training, "steps", fails(NumericalError("at once"), after=-1))
        with pytest.raises(NumericalError, match="at once"):  # in the warm-up: nothing to keep
            trials.train(trial)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_the_device_asked_for_is_the_one_trained_on(tmp_path):
    grid = dataclasses.replace(study.TINY, device="cuda")
    (trial,) = study.candidates(dataclasses.replace(grid, lr_factors=(1.0,)), "adam")
    assert trial.name == "adam-lr=0.01-cuda-seed0"  # its seconds are others
    for trains in (lambda: trials.train(trial), lambda: run(grid, tmp_path)):
        with pytest.raises(ValueError, match=r"no device 'cuda' \(PyTorch finds no CUDA here\)"):
            trains()


def test_each_has_the_epochs_of_its_schedule():
    grid = study.Grid("cifar10-resnet32", ("kbfgs", "kfac", "sgd"), longer=6)
    assert {name: study.candidates(grid, name)[0].epochs for name in grid.optimizers} == {
        "kbfgs": 60, "kfac": 100, "sgd": 200,
    }  # fmt: skip
    (paces,) = study.yardsticks(grid, [0])
    assert {trial.epochs for trial in paces} == {200}  # its schedule ends there
    own = dataclasses.replace(grid, epochs=10)
    assert {study.candidates(own, name)[0].epochs for name in own.optimizers} == {10}
    assert {trial.epochs for trial in study.yardsticks(own, [0])[0]} == {60}


def test_the_grid_is_around_the_recommended_values():
    grid = study.Grid(lr_factors=(0.1, 3.0), damping_factors=(0.1, 1.0, 10.0))
    found = [dict(trial.settings) for trial in study.candidates(grid, "kbfgs_l")]
    assert len(found) == 6
    assert {point["lr"] for point in found} == {0.03, 0.9}
    assert {point["damping"] for point in found} == {0.03, 0.3, 3.0}
    assert {point["history"] for point in found} == {100}
    assert {trial.epochs for trial in study.candidates(grid, "adam")} == {60}
    clipped = [dict(trial.settings) for trial in study.candidates(grid, "eva")]
    assert {(point["lr"], point["kl_clip"]) for point in clipped} == {(0.1, 1e-4), (0.1, 0.09)}
    assert set(grid.optimizers) == set(optimizers.ONE_SOLVE_A_STEP)


def pace(losses, ended=""):
    """A run whose training losses are these, epoch by epoch; ten steps and two seconds each."""
    n = np.arange(len(losses))
    rows = {"step": 10 * n, "epoch": n * 1.0, "seconds": 2.0 * n, "value": losses}
    return pd.DataFrame(rows).assign(metric="train_loss", epochs=len(losses) - 1, ended=ended)


def test_what_sgd_needs_is_the_least_over_its_learning_rates():
    slow, fast = pace([9, 8, 7, 6, 5]), pace([9, 7, 7, 7, 7])
    wild = pace([9, 1e3], ended="training diverged")
    reached = comparison.reached([slow, fast, wild], loss=7.0)
    assert reached == {"step": (10, True), "seconds": (2, True)}
    assert comparison.reached([slow, fast, wild], loss=5.5)["step"] == (40, True)
    assert comparison.reached([slow, fast, wild], loss=4.0)["step"] == (40, False)
    assert np.isnan(comparison.reached([wild], loss=4.0)["step"][0])


def test_a_row_of_the_table():
    own = pace([9, 7.5, 6.5])
    paces = [[pace([9, 8, 7, 6.4, 6])]]
    row = comparison.row("mine", "lr 1", [own], 2, paces)
    assert row.loss == 6.5
    assert row.cells == ["mine", "lr 1", "6.500", "–", "–", "–", "4.00", "1.50", "1.50"]
    beyond = comparison.row("mine", "lr 1", [pace([9, 6, 1.0])], 2, paces)
    assert beyond.cells[-2:] == ["> 2.00", "> 2.00"]
    # medians over the seeds, each against SGD-momentum of its own
    seeds = [own, pace([9, 6, 1.0]), pace([9, 8, 6.7])]
    beside = [*paces, [pace([9, 5, 0.9])], [pace([9, 8, 7, 6.8, 6.7])]]
    assert comparison.row("mine", "", seeds, 2, beside).cells[2:-2] == row.cells[2:-2]
    assert comparison.row("mine", "", seeds, 2, beside).cells[-2:] == ["1.50", "1.50"]
    assert comparison.row("mine", "", seeds[:2], 2, beside[:2]).cells[-2:] == ["1.00", "1.00"]
    ended = pace([9, 8], ended="training diverged at step 11: it was; try less")
    broken = comparison.row("mine", "lr 1", [ended], 2, paces)
    assert broken.loss == np.inf
    settings = "lr 1: training diverged at step 11: it was"
    assert broken.cells == ["mine", settings, "∞", "∞", "–", "1 of 1", "–", "–", "–"]
    assert comparison.row("mine", "", [own], 2, paces, tried=3).cells[5] == "2 of 3"
    table = comparison.table([broken, row], "2 epochs", 1, 6)
    assert [cells[0:3:2] for cells in table.rows] == [["mine", "6.500"], ["mine", "∞"]]
    assert table.columns == [c for c in comparison.COLUMNS if c != "test acc."]


def test_no_pace_no_ratio():
    wild = pace([9, 1e3], ended="training diverged")
    assert comparison.row("mine", "", [pace([9, 7.0])], 1, [[wild]]).cells[-2:] == ["–", "–"]


def test_examples_in_docstrings():
    attempted = [doctest.testmod(module) for module in (comparison, optimizers, published)]
    assert all(found.failed == 0 < found.attempted for found in attempted)
