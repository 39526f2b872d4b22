"""The study of stability: what counts as diverged, its table and its map, by hand and in a run."""

import dataclasses
import html

import numpy as np
import pandas as pd
import pytest
from rich.progress import Progress

from kronscope.studies.experiments.kbfgs_stability import stability as study
from kronscope.studies.reports import stability_maps as maps
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import trials
from tests.pools import in_process


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


def test_a_run(done):
    header, frame = records.read_header(done), records.read(done)
    assert header["status"] == "finished"
    found = {(row["optimizer"], row["lr"]): row for row in header["stability"]}
    assert set(found) == {("kbfgs", 0.3), ("kbfgs", 3000.0), ("sgd", 0.01), ("sgd", 100.0)}
    for mild, wild in (((("kbfgs", 0.3)), ("kbfgs", 3000.0)), (("sgd", 0.01), ("sgd", 100.0))):
        assert (found[mild]["diverged"], found[wild]["diverged"]) == (0, 2)
        assert found[mild]["loss"] < frame["value"].max()
        assert np.isnan(found[wild]["loss"])
    assert all(0 < step < 10 for step in found["sgd", 100.0]["steps"])
    assert len(found["sgd", 100.0]["steps"]) == 2
    assert header["shown"] == ["kbfgs", "sgd"]
    assert {"kbfgs", "kbfgs lr 3000, λ 0.3", "sgd", "sgd lr 100"} == set(frame["optimizer"])
    assert header["comparison"]["rows"][0][:3] == ["kbfgs", "lr 0.3, λ 0.3", "0 of 2 (0–66 %)"]
    text = html.unescape(write_report(done).read_text())
    assert "For how many seeds does a training diverge" in text
    assert (done / "figures" / "stability.png").is_file()


def test_what_is_done_is_not_done_again(done, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in (done / "trials").iterdir()}
    assert len(stamps) == 8
    one = dataclasses.replace(study.TINY, optimizers=("sgd",), lr_factors=(1.0,), seeds=1)
    assert run(one, tmp_path, resume=done) == done
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(records.read_header(done)["stability"]) == 1
    away = dataclasses.replace(study.TINY, optimizers=("sgd",), lr_factors=(1e4,))
    assert records.read_header(run(away, tmp_path, resume=done))["shown"] == ["sgd lr 100"]
    write_report(done)


def test_an_optimizer_without_recommended_settings_has_its_defaults(tmp_path):
    grid = study.Grid("mnist-autoencoder-tanh-small", ("kfac",), seeds=1, workers=1)
    header = records.read_header(run(grid, tmp_path))
    assert header["shown"] == ["kfac"]
    assert header["comparison"]["rows"][0][1] == "defaults"


def test_what_counts_as_diverged(monkeypatch):
    def curve(values, ended="", last_step=-1):
        rows = {"metric": "train_loss", "value": values, "epoch": range(len(values))}
        return pd.DataFrame(rows).assign(seconds=0.0, ended=ended, last_step=last_step)

    curves = [
        curve([9.0, 5.0]),
        curve([9.0, 7.0]),
        curve([9.0, 9.5]),
        curve([9.0], "training diverged", 7),
        curve([9.0], "A cannot be inverted", 4),
    ]
    own = [trials.Trial("p", "sgd", (("lr", 0.1),), seed, 1) for seed in range(5)]
    monkeypatch.setattr(trials, "read", lambda _, trial: curves[trial.seed])
    found = study.outcome(None, own)
    assert (found["seeds"], found["diverged"], found["steps"]) == (5, 3, [4, 7])
    assert found["loss"] == 6.0
    assert np.isnan(found["damping"])


def test_the_map_shows_every_cell():
    rows = [
        {"optimizer": name, "lr": lr, "kl_clip": clip, "damping": damping, "seeds": 4,
         "diverged": count, "steps": [], "loss": np.nan if count == 4 else 12.3456}
        for name, lr, clip, damping, count in (
            ("kbfgs", 0.1, np.nan, 0.3, 0), ("kbfgs", 0.3, np.nan, 0.3, 3),
            ("kbfgs", 0.1, np.nan, 3.0, 1), ("kbfgs", 0.3, np.nan, 3.0, 4),
            ("sgd", 0.01, np.nan, np.nan, 0),
            ("eva", 0.1, 1e-3, 0.03, 0), ("eva", 0.1, 1e-2, 0.03, 2),
        )
    ]  # fmt: skip
    figure = maps.stability_map(rows)
    first, second, third, bar = figure.axes
    assert [axes.get_title() for axes in (first, second, third)] == ["kbfgs", "sgd", "eva"]
    cells = {text.get_position(): text.get_text() for text in first.texts}
    assert cells == {
        (0, 0): "0/4\n12.35",
        (1, 0): "3/4\n12.35",
        (0, 1): "1/4\n12.35",
        (1, 1): "4/4",
    }
    assert [label.get_text() for label in first.get_yticklabels()] == ["0.3", "3"]
    assert (second.get_xlabel(), third.get_xlabel()) == ("learning rate", "KL clip")
    assert [label.get_text() for label in third.get_xticklabels()] == ["0.001", "0.01"]
    assert bar.get_ylabel() == "share of seeds that diverged"
    with pytest.raises(ValueError, match="no outcomes"):
        maps.stability_map([])
