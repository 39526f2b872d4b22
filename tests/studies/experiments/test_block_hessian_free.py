"""The study of block-diagonal Hessian-free: its runs, and what it says of claims, by hand."""

import dataclasses
import html

import numpy as np
import pandas as pd
import pytest
import torch
from rich.progress import Progress

from kronscope.studies import problems
from kronscope.studies.experiments import _hessian_free_claims as claims
from kronscope.studies.experiments import block_hessian_free as study
from kronscope.studies.reports.report import write_report
from kronscope.studies.results import records
from kronscope.studies.training import checkpoints
from kronscope.studies.training import loop as training
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


def test_runs_records_and_report(done):
    frame, header = records.read(done), records.read_header(done)
    curvatures = [f"{kind}, curvature {n}" for kind in ("HF", "block HF") for n in (19, 38, 75)]
    assert set(frame["optimizer"]) == {"Adam, batch 15", "Adam, batch 150", *curvatures}
    steps = frame.groupby("optimizer")["step"].max()
    assert steps["Adam, batch 15"] == 100
    assert {steps[name] for name in [*curvatures, "Adam, batch 150"]} == {10}
    assert header["status"] == "finished"
    assert header["question"].startswith("Does block-diagonal Hessian-free do in large batches")
    assert len(header["claims"]) == 4
    assert header["comparison"]["columns"][:3] == ["run", "settings", "updates"]
    assert [row[0] for row in header["comparison"]["rows"]][2:] == curvatures
    text = html.unescape(write_report(done).read_text())
    assert all(claim.partition(":")[2].strip()[:40] in text for claim in header["claims"])
    drawn = {path.name for path in (done / "figures").glob("loss*.png")}
    assert drawn == {"loss.png", "loss-epoch.png", "loss-seconds.png"}


def test_a_run_goes_on_and_knows_its_own(done, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in (done / "trials").iterdir()}
    assert len(stamps) == 8  # the tuned ones are among those of the middle curvature batch
    assert run(study.TINY, tmp_path, resume=done) == done
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    other = dataclasses.replace(study.TINY, problem="sequential-mnist-lstm-small")
    with pytest.raises(ValueError, match="holds study and problem"):
        run(other, tmp_path, resume=done)


def test_settings_are_tuned_for_one_curvature_batch():
    grid = study.Grid()
    found = study.contenders(grid)
    assert [len(trials) for trials in found.values()] == [5, 5, 9, 9]
    assert {trial.batch_size for trial in found["Adam, batch 15"]} == {15}
    (size,) = {dict(trial.settings)["curvature_batch"] for trial in found["block HF"]}
    assert size == 38  # a quarter of 150, rounded up


def a_run(losses, steps=10, seconds=1.0, test=None, ended=""):
    """Losses by epoch, of `steps` updates each."""
    rows = []
    for metric, values in (("train_loss", losses), ("test_loss", test or losses)):
        for epoch, value in enumerate(values):
            place = {"step": epoch * steps, "epoch": float(epoch), "seconds": epoch * seconds}
            rows.append({**place, "metric": metric, "value": value})
    return pd.DataFrame(rows).assign(epochs=len(losses) - 1, ended=ended)


def test_fewer_updates():
    small = [a_run([9.0, 5.0, 3.0], steps=100)]
    said = claims.fewer_updates(small, [a_run([9.0, 3.0, 2.0])])
    assert said.startswith("holds: ")
    assert "Adam took 200 updates, block HF 10: 20.0 times fewer" in said
    assert claims.fewer_updates(small, [a_run([9.0, 5.0, 3.5])]).startswith("does not hold")
    late = a_run([9.0, 4.0, 2.9], steps=30)  # as far, but 200 over 60
    assert claims.fewer_updates(small, [late]).startswith("does not hold")
    lost = a_run([9.0, 4.0], ended="diverged")
    assert "ended at inf" in claims.fewer_updates(small, [lost])


def test_not_worse_than_plain():
    better, worse = a_run([9.0, 2.0], test=[9.0, 3.0]), a_run([9.0, 2.5], test=[9.0, 3.5])
    odd = a_run([9.0, 2.0], test=[9.0, 4.0])
    assert claims.not_worse_than_plain({8: ([worse], [better])}).startswith("holds")
    said = claims.not_worse_than_plain({8: ([worse], [better]), 4: ([worse], [odd])})
    assert said.startswith("does not hold")
    assert "In 3 of 4 losses; 8: 2 to 2.5 in training, 3 to 3.5 in test" in said
    lost = a_run([9.0, 8.0], ended="the loss is not finite")
    said = claims.not_worse_than_plain({8: ([worse], [better]), 4: ([lost], [lost])})
    assert said.startswith("holds")
    assert "In 2 of 2 losses;" in said
    assert said.endswith("4: both diverged.")
    assert claims.not_worse_than_plain({4: ([lost], [lost])}).startswith("does not hold")


def test_costs_and_late_rise():
    adam, plain, block = (a_run([2.0, 1.0], seconds=s) for s in (1.0, 5.0, 7.0))
    said = claims.costs([adam], {8: ([plain], [block])})
    assert said.startswith("does not hold")
    assert "1.40 to 1.40 times as much; 7.00 to 7.00 times Adam's" in said
    assert claims.costs([adam], {8: ([plain], [plain])}).startswith("holds")
    rising = [a_run([9.0, 2.0, 2.2]), a_run([9.0, 2.0, 2.4]), a_run([9.0, 2.0, 2.0])]
    assert claims.late_rise(rising).startswith("holds")
    assert "1.10 times its least" in claims.late_rise(rising)
    assert claims.late_rise([a_run([9.0, 2.0, 2.0])]).startswith("does not hold")


def test_losses_are_those_of_the_running_average():
    """Polyak averaging where a problem asks for it: (1 - decay) of each new parameter."""
    problem = problems.get("cifar10-small-resnet-small")
    assert problem.averaging == 0.9
    settings = training.Settings(problem, "sgd", 1)
    expected = None
    for state in training.steps(settings):
        now = torch.cat([p.detach().reshape(-1) for p in state.model.parameters()])
        if state.step == 0:
            continue
        expected = now if expected is None else 0.9 * expected + 0.1 * now
        averaged = torch.cat([p.detach().reshape(-1) for p in state.averaged.module.parameters()])
        torch.testing.assert_close(averaged, expected)
    found = training.evaluate(state, problem)
    plain = training.evaluate(dataclasses.replace(state, averaged=None), problem)
    assert found["train_loss"] != plain["train_loss"]
    state.model.load_state_dict(state.averaged.module.state_dict())
    same = training.evaluate(dataclasses.replace(state, averaged=None), problem)
    assert same["train_loss"] == pytest.approx(found["train_loss"], rel=1e-6)


def test_the_average_is_in_the_checkpoint(tmp_path):
    settings = training.Settings(problems.get("cifar10-small-resnet-small"), "sgd", 2)
    for state in training.steps(settings):
        if state.step == state.steps_per_epoch:
            checkpoints.save(state, tmp_path / "half.pt")
    *_, resumed = training.steps(settings, resume=tmp_path / "half.pt")
    one, other = (training.evaluate(s, settings.problem) for s in (state, resumed))
    assert one == other
    assert np.isfinite(one["train_loss"])
