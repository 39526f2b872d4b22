"""Metrics of a truth known by its products alone: estimates, with intervals that hold the value."""

import pytest
import torch

from kronscope.diag import Dense, Diagonal, Kronecker, metrics
from kronscope.diag.randomized import frobenius as probed
from kronscope.diag.truths.matrix_free import MatrixFree

D = 24


@pytest.fixture
def pair():
    """A Hessian-like symmetric matrix, as products and densely."""
    root = torch.randn(D, D)
    matrix = root + root.T + 3 * torch.eye(D)
    return MatrixFree(lambda rows: rows @ matrix, torch.zeros(D), 10), Dense(matrix)


METRICS = ("relative_error", "cosine", "relative_error_best_scale")


@pytest.mark.parametrize("name", METRICS)
def test_estimates_are_near_the_dense_value(pair, name, monkeypatch):
    free, dense = pair
    metric = getattr(metrics, name)
    symmetric = torch.randn(4, 4) + torch.randn(4, 4).T
    for approx in (
        Diagonal(dense.matrix.diagonal()),
        Kronecker(symmetric @ symmetric.T, torch.eye(6)),
        Dense(dense.matrix + 0.1 * torch.eye(D)),
    ):
        exact = metric(dense, approx).value
        found = metric(free, approx)
        assert found.n == probed.PROBES
        assert found.low <= found.value <= found.high
        # 100 probes of a matrix of 24: a standard error of a few hundredths
        assert found.value == pytest.approx(exact, rel=0.15, abs=0.06)
        monkeypatch.setattr(probed, "PROBES", 4000)
        many = metric(free, approx)
        monkeypatch.undo()
        assert many.value == pytest.approx(exact, rel=0.03, abs=0.01)
        assert many.high - many.low < found.high - found.low + 1e-12


def test_the_truth_itself_is_exact(pair):
    free, dense = pair
    assert metrics.relative_error(free, dense).value == pytest.approx(0, abs=1e-12)
    assert metrics.cosine(free, dense).value == pytest.approx(1, abs=1e-12)
    assert metrics.relative_error_best_scale(free, dense).value == pytest.approx(0, abs=1e-7)


def test_intervals_cover():
    """Over many matrices in random bases, 95 % intervals from 100 probes hold the dense value."""
    covered = 0
    for seed in range(120):
        generator = torch.Generator().manual_seed(seed)
        root = torch.randn(D, D, generator=generator)
        matrix = root @ root.T / D
        free = MatrixFree(lambda rows, m=matrix: rows @ m, torch.zeros(D), 10)
        approx = Diagonal(matrix.diagonal())
        exact = metrics.relative_error(Dense(matrix), approx).value
        found = metrics.relative_error(free, approx)
        covered += found.low <= exact <= found.high
    # 95 % of 120 is 114, standard error 2.4; percentiles of 100 probes fall a little short
    assert covered >= 104


def test_global_randomness_is_left_alone(pair):
    free, dense = pair
    before = torch.random.get_rng_state()
    first = metrics.relative_error(free, dense)
    assert first == metrics.relative_error(free, dense)
    assert torch.equal(before, torch.random.get_rng_state())
