"""Sharpness along trainings, in a tiny run against dense matrices; foretelling by hand."""

import copy
import dataclasses
import doctest
import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from rich.progress import Progress

from kronscope.diag import Diagonal, Problem, dense, exact, live
from kronscope.optim import NumericalError
from kronscope.optim.methods.kbfgs.kbfgs import COUNTS
from kronscope.studies import problems, training
from kronscope.studies.experiments.kbfgs_stability import edge_of_stability, layer_health
from kronscope.studies.experiments.kbfgs_stability import sharpness_along_training as study
from kronscope.studies.reports import prediction, report, sharpness_figures
from kronscope.studies.reports.prediction import TracedRun
from kronscope.studies.results import records
from kronscope.studies.training import optimizers
from tests.pools import FOUR_LAYERS, in_process

SMALL = FOUR_LAYERS
TINY = dataclasses.replace(study.TINY, problem=SMALL.name)


def run(grid, results, resume=None):
    with Progress(disable=True) as progress:
        return study.run(grid, results, progress, resume)


@pytest.fixture(scope="module", autouse=True)
def _without_workers():
    with in_process():
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(TINY, tmp_path_factory.mktemp("results"))


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
    assert set(layers["block"]) == {"0", "2", "3", "5"}
    assert set(layers.loc[layers["metric"] == "sharpness", "truth"]) == {"hessian", "ggn"}
    assert "curvature_ratio" not in set(frame.loc[frame["optimizer"] == "kfac", "metric"])
    assert header["comparison"]["columns"] == list(prediction.COLUMNS)
    assert len(header["comparison"]["rows"]) == 5


@pytest.fixture(scope="module")
def trained():
    """The run's first training at step 2: problem, preconditioner, and state before and now."""
    states, steps = [], training.Settings(SMALL, "kbfgs", 1)
    torch.set_default_dtype(torch.float32)  # the initialisation draws in the default dtype
    try:
        for state in itertools.islice(training.steps(steps), 3):
            own = state.optimizer.state
            weights = {n: state.model.get_parameter(f"{n}.weight") for n in ("0", "3")}
            states.append(copy.deepcopy({n: own.get(w) for n, w in weights.items()}))
        data = state.data.train_inputs[:32], state.data.train_targets[:32]
        problem = Problem(state.model, SMALL.loss, *data, dtype=torch.float64)
        return problem, live.preconditioners(state.optimizer), states[1], states[2]
    finally:
        torch.set_default_dtype(torch.float64)


def rows_at(done, step):
    frame = records.read(done)
    return frame[(frame["optimizer"] == "kbfgs") & (frame["seed"] == 0) & (frame["step"] == step)]


def test_the_values_are_those_of_dense_matrices(done, trained):
    problem, P, *_ = trained
    own = rows_at(done, 2)
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


def test_the_factors_are_those_of_dense_matrices(done, trained):
    problem, P, *_ = trained
    found = rows_at(done, 2).set_index(["metric", "block"])["value"]
    a = problem.inputs
    for place, layer in enumerate(problem.model):
        if isinstance(layer, torch.nn.Linear):
            name, H = str(place), P[str(place)]
            G = dense(exact.truth(problem, problem.block(f"{name}.bias"), "hessian"))
            A = torch.cat([a, torch.ones(32, 1)], 1)
            A = A.T @ A / 32
            for side, factor, truth in (("left", H.left, G), ("right", H.right, A)):
                expected = torch.linalg.eigvals(factor @ truth).real.max().item()
                assert found[f"{side}_sharpness", name] == pytest.approx(expected, rel=0.02)
        a = layer(a).detach()


def test_the_efficiency_is_that_of_dense_matrices(done, trained):
    problem, P, *_ = trained
    whole = problem.group("", list(P))
    C, g = dense(exact.ggn(problem, whole)), problem.gradient(whole)
    C += SMALL.measure_damping * torch.eye(len(C))
    d = 0.3 * torch.block_diag(*[dense(P[name]) for name in P]) @ g
    expected = (2 * g @ d - d @ C @ d) / (g @ torch.linalg.solve(C, g))
    own = rows_at(done, 2).set_index("metric")
    assert own["value"]["decrease_efficiency"] == pytest.approx(expected.item(), rel=1e-3)
    assert own["damping"]["decrease_efficiency"] == SMALL.measure_damping


def test_pairs_and_dampings_are_the_optimizers(done, trained):
    """The last pair, from the averages of the last two steps; the averaged one from the state."""
    problem, _, before, now = trained
    found = rows_at(done, 2).set_index(["metric", "approximation", "block"])["value"]
    for name, state in now.items():
        G = dense(exact.truth(problem, problem.block(f"{name}.bias"), "hessian"))
        averaged = [state[key].double() for key in "sy"]
        old = [before[name][key].double() for key in "sy"]
        fresh = [(a - 0.9 * b) / 0.1 for a, b in zip(averaged, old, strict=True)]
        for which, (s, y) in {"pair": fresh, "averaged pair": averaged}.items():
            curvature = (s @ y) / (s @ G @ s)
            cosine = torch.cosine_similarity(y, G @ s, dim=0)
            assert found["pair_curvature", which, name] == pytest.approx(curvature.item(), rel=1e-3)
            assert found["pair_cosine", which, name] == pytest.approx(cosine.item(), rel=1e-3)
        counts = dict(zip(COUNTS, state["counts"].tolist(), strict=True))
        for what in ("Powell fired", "second damping fired", "H_g skipped"):
            metric = what.lower().replace(" ", "_")
            assert found[metric, "", name] == counts[what] / 2


def test_layers_that_nothing_is_said_of_are_left_out():
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(18, 3, bias=False),
        torch.nn.Linear(3, 2),
    )  # fmt: skip
    x, t = torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 1, 0])
    problem = Problem(model, torch.nn.functional.cross_entropy, x, t)
    assert list(layer_health.input_moments(problem)) == ["3"]


def test_what_is_done_is_not_done_again(done, tmp_path):
    stamps = {path: path.stat().st_mtime_ns for path in (done / "records").iterdir()}
    more = dataclasses.replace(TINY, optimizers=("kbfgs",), seeds=3)
    assert run(more, tmp_path, resume=done) == done
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list((done / "records").iterdir())) == 5
    for other in ({"steps": 5}, {"examples": 33}, {"layers_every": 7}):
        (name,) = other
        with pytest.raises(ValueError, match=f"the run to go on with has {name} "):
            run(dataclasses.replace(more, **other), tmp_path, resume=done)


def test_a_run_that_goes_wrong_ends_there(monkeypatch):
    wild = dataclasses.replace(SMALL, optimizers={"kbfgs": {"lr": 1e5, "damping": 0.3}})
    monkeypatch.setattr(problems, "get", lambda _: wild)
    rows, ended = study.trace(dataclasses.replace(TINY, steps=30), "kbfgs", 0)
    assert ended == ""
    losses = [row["value"] for row in rows if row["metric"] == "batch_loss"]
    assert len(losses) < 10
    assert not losses[-1] <= 2 * losses[0]
    assert all(loss <= 2 * losses[0] for loss in losses[:-1])


def test_a_run_whose_optimizer_gives_up(monkeypatch):
    def gives_up(settings):
        yield from itertools.islice(real(settings), give_up_after)
        raise NumericalError("no inverse")

    real = training.steps
    monkeypatch.setattr(training, "steps", gives_up)
    give_up_after = 2
    rows, ended = study.trace(TINY, "kbfgs", 0)
    assert ended == "no inverse"
    assert (rows[-1]["step"], rows[-1]["metric"], rows[-1]["value"]) == (2, "batch_loss", np.inf)
    give_up_after = 0  # in the warm-up
    with pytest.raises(NumericalError, match="no inverse"):
        study.trace(TINY, "kbfgs", 0)


def test_optimizers_without_a_preconditioner_are_refused(tmp_path):
    grid = dataclasses.replace(TINY, optimizers=("kbfgs", "adam"))
    with pytest.raises(ValueError, match=r"'adam' shows no preconditioner.*kbfgs"):
        run(grid, tmp_path)
    assert not any(tmp_path.iterdir())
    shown = set(optimizers.OPTIMIZERS) - {
        "adam",
        "sgd",
        *optimizers.HESSIAN_FREE,
        *optimizers.WRAPPED,
    }
    assert all(study.limit(SMALL.name, name) > 0 for name in shown)


def test_searches_that_cannot_be_made():
    searches, key = edge_of_stability.Searches(), ("",)
    C = Diagonal(torch.tensor([3.0, 1.0]))
    assert searches.value(key, C, lambda v: v) == pytest.approx(3.0)
    assert np.isnan(searches.value(key, C, lambda v: -v))
    assert np.isnan(searches.value(key, C, lambda v: v * np.nan))


def test_pairs_of_steps_that_update_nothing():
    """The last pair stays; shares are of pairs, not of steps."""
    pairs, state = layer_health.Pairs(0.9), {"s": torch.tensor([0.1]), "y": torch.tensor([0.2])}
    pairs.look({"0": state})
    pairs.look({"0": state})
    torch.testing.assert_close(pairs.last["0"], (torch.tensor([1.0]), torch.tensor([2.0])))


def test_foretelling_by_hand():
    late = TracedRun({1: 1.0, 2: 8.0, 3: 9.0}, wrong=3)
    assert (late.alarm(5.0), late.alarm(8.5)) == (2, None)  # what comes with it is no warning
    assert TracedRun({1: 1.0, 2: 8.0}, wrong=None).alarm(5.0) == 2
    assert prediction.rates([late, TracedRun({1: 2.0}, None), TracedRun({1: 6.0}, None)], 5.0) == (
        1.0,
        0.5,
    )
    assert np.isnan(prediction.threshold([late, late]))


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
    (row,) = prediction.table(frame).rows
    assert row == [
        "kbfgs: curvature ratio of the last step", "6.00", "1 of 2", "1 of 2", "2 (2–2)",
    ]  # fmt: skip


def test_examples_in_docstrings():
    for module in (prediction, study):
        found = doctest.testmod(module)
        assert found.failed == 0 < found.attempted


def traced(outcomes, layers=False):
    """Records of runs of six steps; outcomes: whether each went wrong, at step 5."""
    rows = []
    for seed, wrong in enumerate(outcomes):
        shared = {"optimizer": "kbfgs", "seed": seed, "size": 6, "block": "", "truth": ""}
        for step in range(6):
            loss = 99.0 if wrong and step == 5 else 9.0
            own = {**shared, "step": step}
            rows.append({**own, "metric": "batch_loss", "value": loss})
            for truth in ("hessian", "ggn"):
                sharp = {"metric": "sharpness", "truth": truth, "value": (-1.0, 3.0**step)[wrong]}
                rows.append({**own, **sharp})
                rows += [{**own, **sharp, "block": b} for b in ("10", "2") if layers]
    return pd.DataFrame(rows)


def test_the_figure_of_runs():
    drawn = sharpness_figures.run_curves(traced([True, False, True]), "kbfgs", 38.0)
    hessian, ggn, loss = drawn.axes
    assert hessian.get_title() == "λ_max of lr · P · Hessian"
    ends = [line.get_ydata()[-1] for line in hessian.lines if line.get_marker() == "x"]
    assert ends == [3.0**5, 3.0**5]
    limits = [line.get_ydata()[0] for line in ggn.lines if line.get_linestyle() == "--"]
    assert limits == [38.0]
    labels = [text.get_text() for text in drawn.legends[0].get_texts()]
    assert labels[:2] == ["1 runs that stayed right", "2 runs that went wrong"]
    assert len(loss.lines) == 5  # three runs, two crosses
    with pytest.raises(ValueError, match="kfac"):
        sharpness_figures.run_curves(traced([True]), "kfac", 38.0)


def test_the_figure_of_layers():
    drawn = sharpness_figures.layer_map(traced([True, False, True], layers=True), "kbfgs")
    (panel, _) = drawn.axes
    assert [label.get_text() for label in panel.get_yticklabels()] == ["2", "10"]
    heads = [label.get_text() for label in panel.get_xticklabels()]
    assert heads == ["4–6", "1–3", "runs\nright"]
    texts = [text.get_text() for text in panel.texts]
    assert texts[:3] == ["2", "27", "-1"]  # of 1 and 3; of 9, 27, 81; of the run that did not
    with pytest.raises(ValueError, match="no run went wrong"):
        sharpness_figures.layer_map(traced([False], layers=True), "kbfgs")
    assert not sharpness_figures.has_layers(traced([True]))


def test_the_report_draws_them(done):
    page = report.write_report(done).read_text()
    assert (done / "figures" / "edge-kbfgs.png").is_file()
    assert "How near each training with kbfgs was" in page
