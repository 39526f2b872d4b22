"""Metrics of steps against dense formulas, real losses and their intervals by example."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import Dense, Diagonal, Problem, approximations, dense, exact, metrics
from kronscope.diag.metrics._steps import example_decreases, example_losses, example_slopes
from kronscope.diag.operators import inverse, solve
from kronscope.diag.registry import approximation
from kronscope.diag.statistics.intervals import Z
from kronscope.diag.truths.matrix_free import MatrixFree

LAMBDA = 0.05
NAMES = ("kfac", "diagonal", "mini_block", "mini_block_shared")
STEPS = (metrics.step_quality, metrics.decrease_efficiency)


def pairs(problem, of="ggn"):
    for block in problem.blocks():
        truth = exact.truth(problem, block, of)
        for name in NAMES:
            yield block, truth, approximation[name].function(problem, block, of=of)


def positive(d):
    X = torch.randn(d, d)
    return X @ X.T


def test_step_metrics_equal_dense_formulas(classifier):
    for block, truth, approx in pairs(classifier):
        g, eye = classifier.gradient(block), LAMBDA * torch.eye(block.d)
        M = dense(truth) + eye
        d, e = torch.linalg.solve(dense(approx) + eye, g), torch.linalg.solve(M, g)
        quality = (g @ d) ** 2 / (d @ M @ d) / (g @ e)
        efficiency = (g @ d - d @ M @ d / 2) / (g @ e / 2)
        for metric, expected in zip(STEPS, (quality, efficiency), strict=True):
            found = metric(truth, approx, damping=LAMBDA, gradient=g)
            assert found.value == pytest.approx(expected.item(), rel=1e-9)
            assert found.low <= found.value <= found.high <= 1
            assert found.n == 30
            inside = metric(truth, Dense(dense(approx) + eye), LAMBDA, g, 0.0)
            assert inside.value == pytest.approx(expected.item(), rel=1e-9)


@given(seed=st.integers(0, 10_000), d=st.integers(1, 8))
@settings(max_examples=20, deadline=None)
def test_no_step_beats_the_exact_one(seed, d):
    """Quality is the efficiency at the best length, found here by trying many."""
    torch.manual_seed(seed)
    C, B, g = Dense(positive(d)), positive(d) + 0.1 * torch.eye(d), torch.randn(d)
    quality = metrics.step_quality(C, Dense(B), 0.1, g, 0.0).value
    lengths = torch.logspace(-6, 6, 2001)
    tried = [
        metrics.decrease_efficiency(C, Dense(B / t), 0.1, g, 0.0).value for t in lengths[::100]
    ]
    assert max(tried) <= quality + 1e-9
    assert 0 <= quality <= 1
    step = solve(B, g)
    best = (g @ step) / (step @ (C @ step + 0.1 * step))
    at_best = metrics.decrease_efficiency(C, Dense(B / best), 0.1, g, 0.0).value
    assert at_best == pytest.approx(quality, rel=1e-6, abs=1e-9)
    assert metrics.step_quality(C, Dense(B / 7), 0.1, g, 0.0).value == pytest.approx(quality)


def test_step_quality_is_the_squared_ratio_of_wu_s_indicator():
    C, B, g = positive(6) + torch.eye(6), positive(6) + torch.eye(6), torch.randn(6)

    def indicator(step):
        return (step @ C @ step).sqrt() / (step @ g).abs()

    expected = (indicator(solve(C, g)) / indicator(solve(B, g))) ** 2
    found = metrics.step_quality(Dense(C), Dense(B), damping=0.0, gradient=g)
    assert found.value == pytest.approx(expected.item(), rel=1e-9)


def test_known_efficiencies():
    C, g = Dense(positive(5) + torch.eye(5)), torch.randn(5)
    for length, efficiency in [(1.0, 1.0), (2.0, 0.0), (0.5, 0.75), (3.0, -3.0)]:
        scaled = Dense(C.matrix / length)
        found = metrics.decrease_efficiency(C, scaled, damping=0.0, gradient=g)
        assert found.value == pytest.approx(efficiency, abs=1e-9)


def test_a_model_without_a_minimum_has_no_best_step():
    indefinite = Dense(torch.diag(torch.tensor([1.0, -1.0])))
    identity = Dense(torch.eye(2))
    for g in ([1.0, 2.0], [2.0, 1.0], [1.0, 0.9]):
        for metric in STEPS:
            found = metric(indefinite, identity, damping=0.1, gradient=torch.tensor(g))
            assert math.isnan(found.value)
    # bend and best both positive, but the step does better than the saddle: no best one either
    tilted = Dense(torch.diag(torch.tensor([-0.5, 1.0])))
    gradient, wrong = torch.tensor([0.1, 1.0]), Diagonal(torch.tensor([0.2, 1.0]))
    found = metrics.step_quality(tilted, wrong, damping=0.0, gradient=gradient)
    step = gradient / wrong.diagonal
    assert step @ (tilted @ step) > 0
    assert gradient @ solve(tilted, gradient) > 0
    assert math.isnan(found.value)
    assert math.isnan(metrics.step_quality(identity, identity, 0.1, torch.zeros(2)).value)
    for metric in STEPS:  # every step rises without end
        assert math.isnan(metric(Dense(-torch.eye(2)), identity, 0.1, gradient).value)


def test_a_truth_of_products_alone(classifier):
    """Solved by conjugate gradients, to a residual of 1e-10."""
    for block, truth, approx in pairs(classifier):
        g = classifier.gradient(block)
        bare = MatrixFree(lambda rows, C=truth: (C @ rows.T).T, g, truth.n)
        for metric in (*STEPS, metrics.inverse_secant_consistency, metrics.step_cosine):
            found, expected = (metric(C, approx, LAMBDA, g) for C in (bare, truth))
            assert found.value == pytest.approx(expected.value, rel=1e-7)
            assert math.isnan(found.low)
        found, expected = (metrics.secant_consistency(C, approx, g) for C in (bare, truth))
        assert found.value == pytest.approx(expected.value, rel=1e-9)


def test_secants_equal_dense_formulas(classifier):
    for block, truth, approx in pairs(classifier, "hessian"):
        s, eye = classifier.gradient(block), LAMBDA * torch.eye(block.d)
        C, B = dense(truth), dense(approx)
        forward = (B @ s - C @ s).norm() / (C @ s).norm()
        back = torch.linalg.solve(B + eye, (C + eye) @ s)
        found = metrics.secant_consistency(truth, approx, gradient=s)
        assert found.value == pytest.approx(forward.item(), rel=1e-9)
        assert 0 <= found.low <= found.value <= found.high
        inverted = metrics.inverse_secant_consistency(truth, approx, LAMBDA, s)
        assert inverted.value == pytest.approx(((back - s).norm() / s.norm()).item(), rel=1e-8)
        assert 0 <= inverted.low <= inverted.value <= inverted.high


def test_the_secant_is_the_change_of_the_gradient(network):
    """A tiny move along s changes the gradient by C s: finite differences of a real loss."""
    model = network([4, 5, 3], nn.Tanh)
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(20, 4), torch.randint(3, (20,)))
    block = problem.block("0")
    s, step = problem.gradient(block), 1e-4

    def gradient(v):
        v = v.requires_grad_()
        return torch.autograd.grad(problem.loss(problem.outputs(block, v), problem.targets), v)[0]

    change = (gradient(step * s) - gradient(-step * s)) / (2 * step)
    approx = approximations.kfac(problem, block)
    expected = ((approx @ s - change).norm() / change.norm()).item()
    found = metrics.secant_consistency(exact.hessian(problem, block), approx, gradient=s)
    assert found.value == pytest.approx(expected, rel=1e-6)  # central differences: step²


def test_a_bfgs_update_keeps_its_secant():
    """H y = s exactly after the update with the pair (s, y); B = H⁻¹ as a live one is read."""
    d = 6
    C, s, H = Dense(positive(d) + torch.eye(d)), torch.randn(d), positive(d) + torch.eye(d)
    y = C @ s
    rho = 1 / (s @ y)
    V = torch.eye(d) - rho * torch.outer(s, y)
    updated = V @ H @ V.T + rho * torch.outer(s, s)
    before, after = (inverse(Dense(matrix)) for matrix in (H, updated))
    assert metrics.secant_consistency(C, before, gradient=s).value > 0.1
    assert metrics.secant_consistency(C, after, gradient=s).value < 1e-9
    assert metrics.inverse_secant_consistency(C, before, 0.0, s).value > 0.1
    assert metrics.inverse_secant_consistency(C, after, 0.0, s).value < 1e-9


@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_rho_from_two_evaluations_of_the_loss(classifier, of):
    with torch.no_grad():
        before = classifier.loss(classifier.model(classifier.inputs), classifier.targets)
    for block, truth, approx in pairs(classifier, of):
        if of == "hessian" and torch.linalg.eigvalsh(dense(approx))[0] < -LAMBDA / 2:
            continue
        g = classifier.gradient(block)
        d = torch.linalg.solve(dense(approx) + LAMBDA * torch.eye(block.d), g)
        moved = {n: classifier.model.get_parameter(n) for n in block.parameters}
        moved = {n: p - block.split(d)[n] for n, p in moved.items()}
        outputs = torch.func.functional_call(classifier.model, moved, (classifier.inputs,))
        after = classifier.loss(outputs, classifier.targets)
        expected = (before - after) / (g @ d - d @ dense(truth) @ d / 2)
        found = metrics.rho(truth, approx, damping=LAMBDA, problem=classifier, block=block)
        assert found.value == pytest.approx(expected.item(), rel=1e-9)
        assert found.low < found.value < found.high


def test_rho_is_one_for_a_quadratic_loss_and_small_steps(case, classifier):
    problem, layer = case("deep_linear_mse")
    block = problem.block(layer)
    truth = exact.hessian(problem, block)
    for approx in (approximations.diagonal(problem, block), Dense(torch.eye(block.d))):
        for damping in (0.01, 1.0):
            found = metrics.rho(truth, approx, damping, problem, block)
            assert found.value == pytest.approx(1, abs=1e-8)
            assert found.high - found.low < 1e-6  # every example's loss is quadratic
    block = classifier.block("2")
    small = metrics.rho(
        exact.hessian(classifier, block), Dense(torch.eye(block.d)), 1e3, classifier, block
    )
    assert small.value == pytest.approx(1, abs=1e-4)


def test_what_rho_is_made_of_by_example(classifier):
    block = classifier.block("2")
    d = torch.randn(block.d)
    losses, slopes, after = [], [], []
    for x, t in zip(classifier.inputs, classifier.targets, strict=True):
        one = Problem(classifier.model.requires_grad_(True), classifier.loss, x[None], t[None])
        losses.append(one.loss(one.model(one.inputs), one.targets))
        slopes.append(one.gradient(block) @ d)
        after.append(one.loss(one.outputs(block, -d), one.targets))
    losses, slopes, after = (torch.stack(part).detach() for part in (losses, slopes, after))
    outputs = classifier.model(classifier.inputs)
    torch.testing.assert_close(example_losses(classifier, outputs), losses)
    torch.testing.assert_close(example_slopes(classifier, block, d), slopes)
    torch.testing.assert_close(example_decreases(classifier, block, d), losses - after)


def test_the_interval_of_rho_is_that_of_a_ratio_of_means(classifier):
    """Each example left a little heavier moves rho by its influence: differences of the ratio."""
    block = classifier.block("0")
    truth = exact.ggn(classifier, block)
    approx, n = approximations.kfac(classifier, block), classifier.n
    d = solve(dense(approx) + LAMBDA * torch.eye(block.d), classifier.gradient(block))
    actual = example_decreases(classifier, block, d)
    expected = example_slopes(classifier, block, d) - truth.quadratic(d, d) / 2

    def ratio(weights):
        return (weights @ actual) / (weights @ expected)

    even, step = torch.full((n,), 1 / n), 1e-6
    influence = [
        (ratio(even + step * (e - even)) - ratio(even - step * (e - even))) / (2 * step)
        for e in torch.eye(n)
    ]
    half = Z * torch.stack(influence).norm().item() / n
    found = metrics.rho(truth, approx, LAMBDA, classifier, block)
    assert found.high - found.value == pytest.approx(half, rel=1e-6)
    assert found.value - found.low == pytest.approx(half, rel=1e-6)
    plain = metrics.rho(Dense(dense(truth)), approx, LAMBDA, classifier, block)
    assert plain.value == pytest.approx(found.value, rel=1e-12)
    assert math.isnan(plain.low)


@pytest.mark.parametrize("name", ["kfac", "diagonal", "ekfac", "mini_block"])
def test_a_dead_unit_makes_the_undamped_step_an_error(name):
    """Not a NaN: there is no step along what the approximation says has no curvature."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 5))
    with torch.no_grad():
        model[0].bias[1] = -100.0
    problem = Problem(model, nn.MSELoss(), torch.randn(30, 4), torch.randn(30, 5))
    block = problem.block("0")
    truth, approx = exact.ggn(problem, block), approximation[name].function(problem, block)
    keywords = {"damping": 0.1, "gradient": problem.gradient(block), "approximation_damping": 0.0}
    for asked in ("step_cosine", "decrease_efficiency", "inverse_secant_consistency"):
        with pytest.raises(torch.linalg.LinAlgError):
            getattr(metrics, asked)(truth, approx, **keywords)
