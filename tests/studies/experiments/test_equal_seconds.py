"""The ranking after equal seconds: real runs in tiny grids, and the table against ranks by hand."""

import dataclasses
import html

import numpy as np
import pandas as pd
import pytest
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.experiments import equal_seconds as study
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.results.records import loss_row
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


def test_each_trains_until_the_last_mark(done):
    frame, header = records.read(done), records.read_header(done)
    assert header["status"] == "finished"
    assert header["ended"] == {"kfac": {"0": ""}, "adam": {"0": ""}}
    losses = frame[frame["metric"] == "train_loss"]
    for name in study.TINY.optimizers:
        own = losses[losses["optimizer"] == name]
        assert own["step"].min() == 0
        assert own["seconds"].is_monotonic_increasing
        assert len(own) <= len(study.TINY.marks) + 1
        assert (own["seconds"] >= 0.5).sum() == 1  # it ends with the step that passes the last mark
        for mark in study.TINY.seconds:
            assert (own["seconds"] >= mark).any()
    text = html.unescape(write_report(done).read_text())
    assert "At equal seconds" in text
    drawn = {path.name for path in (done / "figures").glob("loss*.png")}
    assert drawn == {"loss-epoch.png", "loss-seconds.png"}


def test_what_is_done_is_not_done_again(done, tmp_path):
    before = records.read_header(done)
    parts = {path: path.stat().st_mtime_ns for path in (done / "records").iterdir()}
    more = dataclasses.replace(study.TINY, optimizers=("kfac", "sgd"))
    assert run(more, tmp_path, resume=done) == done
    assert {path: path.stat().st_mtime_ns for path in parts} == parts
    header = records.read_header(done)
    for name in ("created", "commit", "versions"):
        assert header[name] == before[name]  # what is kept was made then
    assert [set(part) for part in header["resumed"]] == [
        {"created", "commit", "versions", "device"}
    ]
    assert header["seconds"] > before["seconds"] > 0
    assert set(header["ended"]) == {"kfac", "adam", "sgd"}
    assert {row[0] for row in header["ranking"]["rows"]} == {"kfac", "sgd"}
    for other, said in (({"seed": 5}, "seed 0, not 5"), ({"seconds": (0.2, 0.4)}, "seconds ")):
        with pytest.raises(ValueError, match=f"the run to go on with has {said}"):
            run(dataclasses.replace(more, **other), tmp_path, resume=done)
    with pytest.raises(ValueError, match="no optimizer 'nonsense'"):
        run(dataclasses.replace(study.TINY, optimizers=("nonsense",)), tmp_path)


def test_divergence_is_ranked_last(tmp_path, monkeypatch):
    wild = dataclasses.replace(
        problems.get("digits-autoencoder-small"), optimizers={"sgd": {"lr": 1e5, "momentum": 0.9}}
    )
    monkeypatch.setattr(problems, "get", lambda _: wild)
    reason = study.train(tmp_path, study.TINY, "sgd", 3)
    assert reason.startswith("training diverged at step")
    frame = records.read(tmp_path)
    assert len(frame) >= 2  # what was evaluated before is kept
    assert set(frame["seed"]) == {3}


def test_spares_come_in_until_one_gets_to_the_end(tmp_path, monkeypatch):
    fates, asked = {5: "it diverged", 6: "it diverged; try less", 7: ""}, []

    def train(folder, _grid, name, seed):
        asked.append((name, seed))
        fate = fates[seed] if name == "kfac" else ""
        shared = {"run": folder.name, "study": study.NAME, "problem": study.TINY.problem}
        place = {"optimizer": name, "seed": seed, "step": 1, "epoch": 0.1, "seconds": 1.0}
        records.put(folder, name, [{**shared, **place, **loss_row("train_loss", 1.0 + seed)}])
        return fate

    monkeypatch.setattr(study, "_alone", train)
    grid = dataclasses.replace(study.TINY, seed=5, spares=1)
    done = run(grid, tmp_path)
    assert asked == [("kfac", 5), ("kfac", 6), ("adam", 5)]
    rows = {row[0]: row[1:4] for row in records.read_header(done)["ranking"]["rows"]}
    assert rows["kfac"] == ["lr 1, λ 0.3: it diverged", "6", "2 of 2"]
    assert rows["adam"] == ["lr 0.01", "5", "0 of 1"]
    asked.clear()
    run(dataclasses.replace(grid, spares=4), tmp_path, resume=done)
    assert asked == [("kfac", 7)]
    header = records.read_header(done)
    assert header["ended"]["kfac"] == {str(seed): fate for seed, fate in fates.items()}
    said = "seed 5, or the first up to 9 that did not diverge."
    assert header["ranking"]["caption"].endswith(said)


def curve(name, points):
    return [{"optimizer": name, "metric": "train_loss", "value": v, "seconds": s, "step": k,
             "epoch": k / 2} for k, (s, v) in enumerate(points)]  # fmt: skip


def test_the_table_by_hand():
    frame = pd.DataFrame(
        curve("adam", [(0, 9), (0.9, 8), (1.1, 7), (2.1, 6.5)])
        + curve("kfac", [(0, 9), (1.0, 7.5), (2.3, 4)])
        + curve("sgd", [(0, 9), (1.2, 10), (1.4, np.inf)])
    )
    grid = study.Grid("digits-autoencoder", ("adam", "sgd", "kfac"), seconds=(1, 2))
    ended = {"adam": {"0": ""}, "sgd": {"0": "it diverged; try less"}}
    ended["kfac"] = {"0": "it diverged", "1": ""}
    found = study.table(frame, ended, grid)
    assert found.columns == ["optimizer", "settings", "seed", "diverged", "1 s", "2 s", "epochs"]
    assert found.rows == [
        ["kfac", "lr 1, λ 0.3", "1", "1 of 2", "7.500 (2)", "4.000 (1)", "1.00"],
        ["adam", "lr 0.01", "0", "0 of 1", "7.000 (1)", "6.500 (2)", "1.50"],
        ["sgd", "lr 0.01: it diverged", "0", "1 of 1", "10.00 (3)", "∞", "1.00"],
    ]
