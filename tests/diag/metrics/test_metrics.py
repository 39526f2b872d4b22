"""Metrics against dense formulas, their ranges, and their intervals against resampling."""

import math
from pathlib import Path

import pytest
import scipy.linalg
import torch
from torch import nn

from kronscope import diag
from kronscope.diag import Dense, Kronecker, Problem, approximations, dense, exact, metrics
from kronscope.diag.registry import approximation, metric
from kronscope.diag.spectra import preconditioned
from kronscope.diag.statistics.splits import random_splits, signed_norms
from kronscope.diag.truths.kronecker_terms import KroneckerTerms

FOLDER = Path(diag.metrics.__file__).parent
LAMBDA = 0.05


def pairs(problem, of="ggn"):
    """Every curvature approximation there is for a Linear layer, beside the truth."""
    for block in problem.blocks():
        truth = exact.truth(problem, block, of)
        for name, entry in approximation.items():
            if entry.kind == "curvature" and "kernel" not in name:
                yield block, truth, entry.function(problem, block)


def test_nothing_is_missing():
    files = {file.stem for file in FOLDER.glob("[!_]*.py")}
    assert files == set(metric)
    assert len(files) >= 7
    for name, entry in metric.items():
        assert entry.name == name
        assert entry.formula
        assert entry.range
        assert entry.best
        assert entry.reference


def test_frobenius_metrics_equal_dense_formulas(classifier):
    count = 0
    for _, truth, approx in pairs(classifier):
        C, B = dense(truth), dense(approx)
        for left, right in [(truth, approx), (Dense(C), Dense(B))]:
            # errors are roots of differences of squares: 1e-7 near zero
            error = ((C - B).norm() / C.norm()).item()
            assert metrics.relative_error(left, right).value == pytest.approx(error, abs=1e-7)
            cos = ((C * B).sum() / C.norm() / B.norm()).item()
            assert metrics.cosine(left, right).value == pytest.approx(cos, abs=1e-12)
            best = math.sqrt(max(1 - cos**2, 0))
            found = metrics.relative_error_best_scale(left, right).value
            assert found == pytest.approx(best, abs=1e-7)
        count += 1
    assert count >= 21


def test_errors_far_from_zero_to_ten_digits(classifier):
    for block in classifier.blocks():
        truth = exact.hessian(classifier, block)
        C = dense(truth)
        for name in ("kfac", "diagonal", "mini_block", "mini_block_input"):
            approx = approximation[name].function(classifier, block)
            expected = ((C - dense(approx)).norm() / C.norm()).item()
            assert expected > 1e-3
            assert metrics.relative_error(truth, approx).value == pytest.approx(expected, rel=1e-10)


def test_excess_is_the_difference_to_the_best(classifier):
    for block in classifier.blocks():
        truth = exact.ggn(classifier, block)
        best = approximations.best_kronecker(classifier, block)
        least = metrics.relative_error(truth, best).value
        assert metrics.excess_over_best_kronecker(truth, best).value == pytest.approx(0, abs=1e-9)
        diagonal = approximations.diagonal(classifier, block)
        own = metrics.relative_error(truth, diagonal).value
        excess = metrics.excess_over_best_kronecker(truth, diagonal).value
        assert excess == pytest.approx(own - least, rel=1e-9)


@pytest.mark.parametrize("dense_up_to", [400, 0])
def test_condition_equals_the_generalised_eigenvalues(classifier, monkeypatch, dense_up_to):
    """By the full decomposition and by Lanczos (whose residual tolerance is 1e-3)."""
    monkeypatch.setattr(preconditioned, "DENSE_UP_TO", dense_up_to)
    for block, truth, approx in list(pairs(classifier))[:: 1 if dense_up_to else 5]:
        eye = LAMBDA * torch.eye(block.d)
        values = scipy.linalg.eigh(
            (dense(truth) + eye).numpy(), (dense(approx) + eye).numpy(), eigvals_only=True
        )
        found = metrics.preconditioned_condition(truth, approx, damping=LAMBDA)
        assert found.value == pytest.approx(
            values[-1] / values[0], rel=1e-4 if not dense_up_to else 1e-9
        )
        assert found.value >= 1 - 1e-9
        assert found.low <= found.value + 1e-9
        assert found.value <= found.high


def test_condition_of_an_indefinite_truth_is_infinite(classifier):
    block = classifier.block("0")
    truth = exact.hessian(classifier, block)
    approx = approximations.kfac(classifier, block)
    assert torch.linalg.eigvalsh(dense(truth))[0] < -1e-6
    assert metrics.preconditioned_condition(truth, approx, damping=1e-6).value == math.inf
    indefinite = approximations.kfac(classifier, block, of="hessian")
    definite = exact.ggn(classifier, block)
    assert metrics.preconditioned_condition(definite, indefinite, damping=1e-9).value == math.inf


def test_step_cosine(classifier):
    for block, truth, approx in pairs(classifier):
        g, eye = classifier.gradient(block), LAMBDA * torch.eye(block.d)
        taken = torch.linalg.solve(dense(approx) + eye, g)
        best = torch.linalg.solve(dense(truth) + eye, g)
        expected = torch.nn.functional.cosine_similarity(taken, best, dim=0).item()
        found = metrics.step_cosine(truth, approx, damping=LAMBDA, gradient=g)
        assert found.value == pytest.approx(expected, rel=1e-9)
        assert -1 <= found.low <= found.value <= found.high <= 1 + 1e-12
        undamped = metrics.step_cosine(
            truth, Dense(dense(approx) + eye), damping=LAMBDA, gradient=g, approximation_damping=0.0
        )
        assert undamped.value == pytest.approx(expected, rel=1e-9)


def test_noise_floor_equals_explicit_halves(classifier):
    block = classifier.block("0")
    truth = exact.ggn(classifier, block)
    terms = torch.einsum("nop,ni,nj->noipj", truth.C, truth.a, truth.a)
    terms = terms.reshape(truth.n, block.d, block.d)
    generator = torch.Generator().manual_seed(truth.n)
    order = torch.rand(5, truth.n, generator=generator).argsort(1)
    half = truth.n // 2
    norms = signed_norms(truth.gram, random_splits(truth.n, half, half, 5))
    for squared, rows in zip(norms, order, strict=True):
        gap = terms[rows[:half]].mean(0) - terms[rows[half : 2 * half]].mean(0)
        assert squared.item() == pytest.approx(gap.square().sum().item(), rel=1e-9)
    with pytest.raises(ValueError, match="per-example terms"):
        metrics.noise_floor(Dense(torch.eye(3)))


@pytest.mark.slow
def test_noise_floor_predicts_the_distance_to_the_population():
    """Blocks of small batches scatter around that of a large one as their floor says."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, t = torch.randn(6000, 3), torch.randint(2, (6000,))
    whole = Problem(model, nn.CrossEntropyLoss(), x, t)
    population = dense(exact.ggn(whole, whole.block("0")))
    floors, gaps = [], []
    for rows in torch.arange(6000).split(60):
        part = Problem(model, nn.CrossEntropyLoss(), x[rows], t[rows])
        truth = exact.ggn(part, part.block("0"))
        floors.append(metrics.noise_floor(truth).value ** 2)
        gaps.append(((dense(truth) - population).norm() / dense(truth).norm()).item() ** 2)
    ratio = (sum(floors) / sum(gaps)) ** 0.5
    assert ratio == pytest.approx(1, abs=0.1)  # 100 batches: a few per cent of noise


@pytest.mark.slow
def test_intervals_hold_what_other_batches_show():
    """A fixed approximation, measured on many batches: their spread matches the intervals.

    The share of other batches' values inside one batch's 95 % interval is 1 - P(|difference| > ...)
    = about 0.83 for normal noise in both; required: 0.65 to 0.99 for the mean over batches.
    """
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, t = torch.randn(3200, 3), torch.randint(2, (3200,))
    reference = Problem(model, nn.CrossEntropyLoss(), x, t)
    block = reference.block("0")
    fixed = approximations.mini_block(reference, block)
    shown = {"relative_error": [], "cosine": [], "step_cosine": [], "preconditioned_condition": []}
    for rows in torch.arange(3200).split(80):
        part = Problem(model, nn.CrossEntropyLoss(), x[rows], t[rows])
        truth = exact.ggn(part, part.block("0"))
        keywords = {"damping": 0.05, "gradient": reference.gradient(block)}
        for name, estimates in shown.items():
            needed = {k: keywords[k] for k in metric[name].needs}
            estimates.append(metric[name].function(truth, fixed, **needed))
    for name, estimates in shown.items():
        values = torch.tensor([e.value for e in estimates])
        inside = [((values >= e.low) & (values <= e.high)).double().mean() for e in estimates]
        share = torch.stack(inside).mean().item()
        assert 0.65 < share < 0.99, (name, share)


def test_estimates_without_terms_claim_no_interval(classifier):
    block = classifier.block("0")
    truth = Dense(dense(exact.ggn(classifier, block)))
    found = metrics.relative_error(truth, approximations.kfac(classifier, block))
    with pytest.raises(ValueError, match="factor sizes of a Dense truth are unknown"):
        metrics.excess_over_best_kronecker(truth, approximations.kfac(classifier, block))
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_estimates_carry_their_sample_count(classifier):
    for _, truth, approx in pairs(classifier):
        found = metrics.relative_error(truth, approx)
        assert found.n == 30
        assert found.low <= found.value <= found.high
        assert "n = 30" in str(found)
        assert float(found) == found.value


def test_measuring_twice_gives_the_same(classifier):
    block = classifier.block("0")
    first = metrics.relative_error(
        exact.ggn(classifier, block), approximations.diagonal(classifier, block)
    )
    again = Problem(
        classifier.model.requires_grad_(True),
        classifier.loss,
        classifier.inputs,
        classifier.targets,
    )
    block = again.block("0")
    assert first == metrics.relative_error(
        exact.ggn(again, block), approximations.diagonal(again, block)
    )


def test_unknown_metric():
    with pytest.raises(ValueError, match=r"no metric 'cosin'; known: \['cosine'"):
        metric["cosin"]


def test_a_truth_that_cannot_be_told_from_zero_has_an_open_interval():
    """Terms that cancel but for noise: some resampled batches leave no norm to divide by."""
    C, a = torch.randn(8, 2, 2), torch.randn(8, 3)
    C = torch.cat([C + C.mT, -C - C.mT]) + 0.01 * torch.eye(2)
    truth = KroneckerTerms(torch.cat([a, a]), C)
    approx = Kronecker(torch.eye(2), torch.eye(3))
    error = metrics.relative_error(truth, approx)
    assert error.low <= error.value <= error.high == math.inf
    best = metrics.relative_error_best_scale(truth, approx)
    assert 0 <= best.low <= best.value <= best.high <= 1
    assert best.high > 0.99
    cosine = metrics.cosine(truth, approx)
    assert -1 <= cosine.low <= cosine.value <= cosine.high <= 1
