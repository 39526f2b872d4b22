"""The greatest eigenvalue of P C against dense ones, and what it says of too long steps."""

import doctest

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import Dense, Kronecker, Problem, approximations, dense, exact, live, metrics
from kronscope.diag.operators import solver
from kronscope.diag.spectra import sharpness
from kronscope.diag.spectra.sharpness import sharpest, side_by_side, stability_limit
from kronscope.optim import KBFGS


def pair(d, seed=0, rank=None):
    """An indefinite C (of some rank) and a positive definite B."""
    generator = torch.Generator().manual_seed(seed)
    Q, R = (torch.randn(d, d, generator=generator, dtype=torch.float64) for _ in range(2))
    signs = torch.linspace(1.5, -1, d)
    signs[rank or d :] = 0.0
    return Dense(Q @ torch.diag(signs) @ Q.T), Dense(R @ R.T / d + 0.1 * torch.eye(d))


@settings(deadline=None, max_examples=40)
@given(d=st.integers(1, 60), seed=st.integers(0, 999))
def test_it_is_that_of_the_dense_pair(d, seed):
    C, B = pair(d, seed)
    exact_values = scipy.linalg.eigh(dense(C), dense(B), eigvals_only=True)
    found = sharpest(C, solver(B, 0.0), tolerance=1e-9, products=2000)
    scale = abs(exact_values).max()
    assert found.value == pytest.approx(exact_values[-1], abs=1e-8 * scale)
    u, w = found.vector, found.dual
    torch.testing.assert_close(u @ w, torch.tensor(1.0))
    torch.testing.assert_close(dense(B) @ u, w)
    off = dense(C) @ u - found.value * w
    assert (off @ solver(B, 0.0)(off)).sqrt().item() == pytest.approx(
        found.residual, abs=1e-7 * scale
    )


def test_few_products_suffice_from_the_vector_of_a_moment_ago():
    C, B = pair(300, rank=120)
    P = solver(B, 0.0)
    cold = sharpest(C, P)
    moved = Dense(dense(C) + 1e-3 * torch.diag(torch.randn(300)))
    assert sharpest(moved, P, start=cold.dual, tolerance=0.01).products <= 3 < cold.products


def test_the_products_allowed_are_kept_to():
    C, B = pair(300)
    found = sharpest(C, solver(B, 0.0), tolerance=1e-12, products=30)
    assert found.products == 30
    assert found.residual > 0


def test_no_curvature():
    found = sharpest(Dense(torch.zeros(5, 5)), lambda v: 2 * v)
    assert (found.value, found.residual) == (0.0, 0.0)


def test_refusals():
    C, _ = pair(6)
    with pytest.raises(ValueError, match=r"preconditioner \(w · P w = .*is not positive def"):
        sharpest(C, lambda v: -v)
    with pytest.raises(ValueError, match="the curvature or the preconditioner is not finite"):
        sharpest(Dense(dense(C) * float("nan")), lambda v: v)
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\), not 1"):
        stability_limit(1.0)


def test_steps_beyond_the_limit_diverge_and_others_do_not():
    """Averaged momentum on a quadratic, a hundredth to either side of the limit."""
    C, B = pair(20, seed=3)
    C = Dense(dense(C) @ dense(C) / 20)
    P = torch.linalg.inv(dense(B))
    greatest = sharpest(C, solver(B, 0.0), tolerance=1e-9).value
    for momentum in (0.0, 0.5, 0.9):
        for factor in (0.99, 1.01):
            lr = factor * stability_limit(momentum) / greatest
            theta, m = torch.ones(20), torch.zeros(20)
            for _ in range(4000):
                m = momentum * m + (1 - momentum) * (dense(C) @ theta)
                theta = theta - lr * P @ m
            assert (theta.norm() > 1e3) == (factor > 1)


def test_the_metric_and_a_live_preconditioner():
    """Per layer, and of all layers together by products alone."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, t = torch.randn(30, 5), torch.randint(3, (30,))
    optimizer = KBFGS(model, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    held = live.preconditioners(optimizer)
    for block in problem.blocks():
        C, P = exact.ggn(problem, block), held[block.name]
        expected = torch.linalg.eigvals(dense(P) @ dense(C)).real.max().item()
        implied = live.curvatures(optimizer)[block.name]
        found = metrics.preconditioned_sharpness(C, implied, 0.3, approximation_damping=0.0)
        assert found.value == pytest.approx(expected, rel=1e-6)
        assert found.low < found.value < found.high
    whole = problem.group("all", [block.name for block in problem.blocks()])
    layers = [held[block.name] for block in problem.blocks()]
    P = torch.block_diag(*map(dense, layers))
    C = exact.hessian(problem, whole)
    expected = torch.linalg.eigvals(P @ dense(C)).real.max().item()
    found = sharpest(C, side_by_side(layers), tolerance=1e-9)
    assert found.value == pytest.approx(expected, rel=1e-8)


def test_an_approximation_that_is_enough_has_at_most_1(classifier):
    block = classifier.block("2")
    C = exact.ggn(classifier, block)
    found = metrics.preconditioned_sharpness(C, C, damping=1e-6)
    assert found.value == pytest.approx(1.0, abs=1e-4)
    own = metrics.preconditioned_sharpness(C, approximations.kfac(classifier, block), damping=0.1)
    B = dense(approximations.kfac(classifier, block)) + 0.1 * torch.eye(block.d)
    assert own.value == pytest.approx(
        scipy.linalg.eigh(dense(C), B, eigvals_only=True)[-1], rel=1e-8
    )
    product = Kronecker(torch.eye(2), 2 * torch.eye(3))
    assert metrics.preconditioned_sharpness(Dense(4 * torch.eye(6)), product, 0.0).value == (
        pytest.approx(2.0)
    )


def test_examples_in_docstrings():
    found = doctest.testmod(sharpness)
    assert found.failed == 0 < found.attempted
