"""Sharpness along trainings, in a tiny run against dense matrices; foretelling by hand."""

import dataclasses
import doctest

import numpy as np
import pandas as pd
import pytest
import torch
from rich.progress import Progress

from diag import Problem, dense, exact, live
from studies import foretelling, problems, records, training
from studies import sharpness_along_training as study
from studies.foretelling import Run

SMALL = problems.get("digits-autoencoder-small")


def run(grid, results, resume=None):
    with Progress(disable=True) as progress:
        return study.run(grid, results, progress, resume)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(study.TINY, tmp_path_factory.mktemp("results"))


def test_a_run(done):
    header, frame = records.read_header(done), records.read(done)
    assert header["status"] == "finished"
    assert set(zip(frame["optimizer"], frame["seed"], strict=True)) == {
        (name, seed) for name in ("kbfgs", "kfac") for seed in (0, 1)
    }
    own = frame[(frame["optimizer"] == "kbfgs") & (frame["seed"] == 0)]
    assert set(own["step"]) == {0, 1, 2, 3}
    assert set(own.loc[own["metric"] == "curvature_ratio", "step"]) == {1, 2, 3}
    layers = own[own["block"] != ""]
    assert set(layers["step"]) == {2}
    assert set(layers["block"]) == {"0", "2", "4", "5", "7", "9"}
    assert set(layers["truth"]) == {"hessian", "ggn"}
    assert "curvature_ratio" not in set(frame.loc[frame["optimizer"] == "kfac", "metric"])
    assert header["comparison"]["columns"] == list(foretelling.COLUMNS)
    assert len(header["comparison"]["rows"]) == 5


def test_the_values_are_those_of_dense_matrices(done):
    frame = records.read(done)
    torch.set_default_dtype(torch.float32)  # the initialisation draws in the default dtype
    try:
        settings = training.Settings(SMALL, "kbfgs", 1)
        state = next(state for state in training.steps(settings) if state.step == 2)
        data = state.data.train_inputs[:32], state.data.train_targets[:32]
        problem = Problem(state.model, SMALL.loss, *data, dtype=torch.float64)
        P = live.preconditioners(state.optimizer)
    finally:
        torch.set_default_dtype(torch.float64)
    own = frame[(frame["optimizer"] == "kbfgs") & (frame["seed"] == 0) & (frame["step"] == 2)]
    for of in ("hessian", "ggn"):
        found = own[(own["metric"] == "sharpness") & (own["truth"] == of)].set_index("block")
        for block in problem.blocks():
            C = dense(exact.truth(problem, block, of))
            expected = 0.3 * torch.linalg.eigvals(dense(P[block.name]) @ C).real.max().item()
            assert found["value"][block.name] == pytest.approx(expected, rel=0.02)
        whole = dense(exact.truth(problem, problem.group("", list(P)), of))
        joined = torch.block_diag(*[dense(P[block.name]) for block in problem.blocks()])
        expected = 0.3 * torch.linalg.eigvals(joined @ whole).real.max().item()
        assert found["value"][""] == pytest.approx(expected, rel=0.02)


def test_what_is_done_is_not_done_again(done, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in (done / "records").iterdir()}
    more = dataclasses.replace(study.TINY, optimizers=("kbfgs",), seeds=3)
    assert run(more, tmp_path, resume=done) == done
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list((done / "records").iterdir())) == 5


def test_a_run_that_goes_wrong_ends_there(monkeypatch):
    wild = dataclasses.replace(SMALL, optimizers={"kbfgs": {"lr": 1e5, "damping": 0.3}})
    monkeypatch.setattr(problems, "get", lambda _: wild)
    rows = study.trace(dataclasses.replace(study.TINY, steps=30), "kbfgs", 0)
    losses = [row["value"] for row in rows if row["metric"] == "batch_loss"]
    assert len(losses) < 10
    assert not losses[-1] <= 2 * losses[0]
    assert all(loss <= 2 * losses[0] for loss in losses[:-1])
    with pytest.raises(AttributeError, match="preconditioner"):
        study.trace(study.TINY, "adam", 0)


def test_foretelling_by_hand():
    late = Run({1: 1.0, 2: 8.0, 3: 9.0}, wrong=3)
    assert (late.alarm(5.0), late.alarm(8.5)) == (2, None)  # what comes with it is no warning
    assert Run({1: 1.0, 2: 8.0}, wrong=None).alarm(5.0) == 2
    assert foretelling.rates([late, Run({1: 2.0}, None), Run({1: 6.0}, None)], 5.0) == (1.0, 0.5)
    assert np.isnan(foretelling.threshold([late, late]))


def test_the_table_is_of_seeds_that_the_threshold_was_not_chosen_on():
    def rows(seed, losses, values):
        for step, (loss, value) in enumerate(zip(losses, values, strict=True)):
            shared = {"optimizer": "kbfgs", "seed": seed, "step": step, "block": "", "truth": ""}
            yield {**shared, "metric": "batch_loss", "value": loss}
            yield {**shared, "metric": "curvature_ratio", "value": value}

    frame = pd.DataFrame(
        [
            *rows(0, [10, 8, 7, 30], [0, 1, 9, 99]),  # wrong, chosen on
            *rows(2, [10, 8, 7, 6], [0, 1, 2, 3]),
            *rows(1, [10, 8, 7, 25], [0, 7, 8, 99]),  # two steps ahead
            *rows(3, [10, 8, np.nan], [0, 1, 99]),  # not foretold
            *rows(5, [10, 8, 7, 6], [0, 1, 2, 50]),  # a false alarm
            *rows(7, [10, 19, 7, 6], [0, 1, 2, 3]),  # a rise that is none
        ]
    )
    (row,) = foretelling.table(frame)["rows"]
    assert row == [
        "kbfgs: curvature ratio of the last step", "6.00", "1 of 2", "1 of 2", "2 (2–2)",
    ]  # fmt: skip


def test_examples_in_docstrings():
    found = doctest.testmod(foretelling)
    assert found.failed == 0 < found.attempted
