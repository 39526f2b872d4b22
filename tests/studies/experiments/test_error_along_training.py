"""The main study, run for real in its tiny grid."""

import numpy as np
import pandas as pd
import pytest
import torch
from rich.progress import Progress

from kronscope.diag import Problem, approximations, exact, metrics
from kronscope.studies.experiments import error_along_training as study
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import loop as training
from tests.pools import FOUR_LAYERS, in_process

LAYERS = {"0": 520, "2": 45, "3": 48, "5": 576}


def test_what_is_measured(demo_run):
    frame = records.read(demo_run)
    assert frame.attrs["damaged"] == []
    assert set(frame["optimizer"]) == {"kbfgs", "kfac", "adam"}
    assert set(frame["step"]) == {0, 20}
    compared = frame[frame["approximation"] != ""]
    sizes = dict(zip(compared["block"], compared["size"], strict=True))
    assert sizes == LAYERS
    shared = {"kfac", "diagonal", "mini_block", "best_kronecker"}
    for optimizer, own in compared.groupby("optimizer"):
        live = {
            "adam": set(),
            "kbfgs": {"kbfgs_live"},
            "kfac": {"kfac_live", "kfac_live_undamped"},
        }[optimizer]
        assert set(own["approximation"]) == shared | live
        counts = own.groupby(["step", "block", "truth", "approximation"])["metric"].nunique()
        assert set(counts) == {6}
        assert len(counts) == 2 * len(LAYERS) * 2 * (4 + len(live))
    assert {"noise_floor", "train_loss", "test_loss"} < set(frame["metric"])


def test_numbers_make_sense(demo_run):
    frame = records.read(demo_run)
    compared = frame[frame["approximation"] != ""]
    assert not compared["value"].isna().any()
    errors = compared[compared["metric"] == "relative_error"]
    assert (errors["low"] <= errors["value"]).all()
    assert (errors["value"] <= errors["high"]).all()
    wide = errors.pivot_table(
        "value", ["optimizer", "step", "block", "truth"], "approximation", "first"
    )
    slack = 1e-7  # roots of differences of squares
    assert (wide["best_kronecker"] <= wide["kfac"] + slack).all()
    assert (wide["mini_block"] <= wide["diagonal"] + slack).all()
    condition = compared[compared["metric"] == "preconditioned_condition"]
    assert (condition["value"] >= 1 - 1e-6).all()
    assert set(condition["damping"]) == {0.1}
    cosines = compared[compared["metric"].isin(["cosine", "step_cosine"])]["value"]
    assert cosines.between(-1 - 1e-9, 1 + 1e-9).all()


def test_a_row_is_what_diag_says(demo_run):
    """The very number again, by hand: KFAC against the GGN of layer 3 before training."""
    frame = records.read(demo_run)
    row = frame[
        (frame["optimizer"] == "adam")
        & (frame["step"] == 0)
        & (frame["block"] == "3")
        & (frame["truth"] == "ggn")
        & (frame["approximation"] == "kfac")
        & (frame["metric"] == "relative_error")
    ].iloc[0]
    setting = FOUR_LAYERS
    state = training.start(training.Settings(setting, "adam", epochs=1))
    x = state.data.train_inputs[: row["n"]]
    problem = Problem(state.model, setting.loss, x, x, dtype=torch.float64)
    block = problem.block("3")
    found = metrics.relative_error(exact.ggn(problem, block), approximations.kfac(problem, block))
    assert row["value"] == pytest.approx(found.value, rel=1e-6)
    assert row["low"] == pytest.approx(found.low, rel=1e-6)


def test_matrices_of_every_layer(demo_run):
    index = records.list_matrices(demo_run)
    assert len(index) == 3 * 2 * len(LAYERS) * 2
    place = index[(index["optimizer"] == "kbfgs") & (index["block"] == "3")].iloc[0]
    found = records.load_matrices(place["path"])
    assert found["exact"].shape == (48, 48)
    np.testing.assert_allclose(
        found["kfac - exact"],
        found["kfac"] - found["exact"],
        atol=1e-5 * np.abs(found["exact"]).max(),
    )
    assert "kbfgs_live" in found


def test_the_header_says_what_was_done(demo_run):
    header = records.read_header(demo_run)
    assert header["status"] == "finished"
    assert header["problem"] == FOUR_LAYERS.name
    assert header["versions"]["torch"].startswith("2.13.0")
    assert header["config"]["optimizers"] == ["kbfgs", "kfac", "adam"]
    assert set(header["metrics"]) >= {"relative_error", "noise_floor", "step_cosine"}
    assert header["seconds"] > 0


def test_report_and_figures(demo_run):
    report = demo_run / "report.html"
    text = report.read_text()
    assert text.count("data:image/png;base64,") >= 8
    assert "Verdict" in text
    assert len(list((demo_run / "figures").glob("*.png"))) >= 8


def test_a_diverging_optimizer_is_told_of_and_the_others_go_on(tmp_path, monkeypatch):
    """SGD with a huge step diverges after the first measurement; Adam's rows are complete."""
    setting = FOUR_LAYERS
    wild = {**setting.optimizers, "sgd": {"lr": 1e3}}
    monkeypatch.setitem(setting.optimizers, "sgd", wild["sgd"])
    grid = study.Grid(
        setting.name, ("sgd", "adam"), epochs=1, points=2, examples=8, damped_every=9, workers=1
    )
    with in_process(), Progress(disable=True) as progress:
        run = study.run(grid, tmp_path, progress)
    status = records.read_header(run)["status"]
    assert status.startswith("diverged: sgd: training diverged at step")
    assert (run / "last-finite-sgd.pt").is_file()
    steps = records.read(run).groupby("optimizer")["step"].agg(set)
    assert steps["adam"] == {0, 10}
    assert steps["sgd"] == {0}
    assert "diverged" in write_report(run).read_text()


def test_an_error_keeps_the_rows_and_says_failed(tmp_path):
    grid = study.Grid(
        FOUR_LAYERS.name, ("adam", "nonsense"), epochs=1, points=2, examples=8, workers=1
    )
    refused = pytest.raises(ValueError, match="no optimizer")
    with in_process(), Progress(disable=True) as progress, refused:
        study.run(grid, tmp_path, progress)
    (run,) = tmp_path.iterdir()
    assert records.read_header(run)["status"].startswith("failed: no optimizer 'nonsense'")


def test_measuring_does_not_change_training(demo_run):
    """Losses of the measured run are those of a run nobody looked at."""
    setting = FOUR_LAYERS
    frame = records.read(demo_run)
    for name in ("kbfgs", "kfac", "adam"):
        settings = training.Settings(setting, name, study.TINY.epochs)
        *_, state = training.steps(settings)
        rows = frame[(frame["optimizer"] == name) & (frame["step"] == state.step)]
        losses = training.evaluate(state, setting)
        for metric in ("train_loss", "test_loss"):
            measured = rows[rows["metric"] == metric]["value"].item()
            assert measured == losses[metric], (name, metric)


def test_values_have_the_columns_of_the_schema(demo_run):
    part = next((demo_run / "records").glob("*.parquet"))
    assert list(pd.read_parquet(part).columns) == list(records.COLUMNS)
