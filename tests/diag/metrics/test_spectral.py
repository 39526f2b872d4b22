"""Metrics of the whole matrix against dense formulas: norms, inverses, determinants, spectra."""

import math

import pytest
import scipy.linalg
import torch

from kronscope.diag import (
    BlockDiagonal,
    Dense,
    Diagonal,
    Kronecker,
    approximations,
    dense,
    exact,
    metrics,
)
from kronscope.diag.operators import inverse
from kronscope.diag.operators.batched import Outer
from kronscope.diag.registry import approximation
from kronscope.diag.spectra import eigenspaces, pencils
from kronscope.diag.spectra.eigenspaces import dominant
from kronscope.diag.spectra.pencils import count_below
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms

LAMBDA = 0.05
NAMES = ("kfac", "diagonal", "mini_block", "mini_block_input", "mini_block_shared")


def pairs(problem, of="ggn"):
    for block in problem.blocks():
        truth = exact.truth(problem, block, of)
        for name in NAMES:
            yield truth, approximation[name].function(problem, block, of=of)


def roots(d, n=4, k=2):
    return LowRankTerms(torch.randn(n, k, d))


def pencil(truth, approx, added=LAMBDA):
    """Eigenvalues of (C + λI) x = ν (B + μI) x."""
    eye = torch.eye(truth.shape[0])
    C, B = (dense(truth) + LAMBDA * eye).numpy(), (dense(approx) + added * eye).numpy()
    return torch.from_numpy(scipy.linalg.eigh(C, B, eigvals_only=True))


class Products:
    """Nothing but .shape, @ and what says in which dtype."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, matrix):
        self.shape, self._apply = tuple(matrix.shape), lambda v: matrix @ v

    def __matmul__(self, v):
        return self._apply(v)


@pytest.mark.parametrize("of", ["ggn", "hessian"])
def test_spectral_residual(classifier, of):
    for truth, approx in pairs(classifier, of):
        C, B = dense(truth), dense(approx)
        expected = torch.linalg.matrix_norm(C - B, 2) / torch.linalg.matrix_norm(C, 2)
        found = metrics.spectral_residual(truth, approx)
        assert found.value == pytest.approx(expected.item(), rel=1e-10)
        assert 0 <= found.low <= found.value <= found.high


def test_spectral_residual_by_products_alone(monkeypatch):
    """Lanczos stops at a residual of 1e-6: the eigenvalue is good to about its square."""
    monkeypatch.setattr(eigenspaces, "DENSE_UP_TO", 0)
    for sign in (1, -1):
        X, Y = torch.randn(60, 40), torch.randn(60, 5)
        C, B = X @ X.T, X @ X.T + sign * Y @ Y.T
        expected = torch.linalg.matrix_norm(C - B, 2) / torch.linalg.matrix_norm(C, 2)
        found = metrics.spectral_residual(Products(C), Products(B))
        assert found.value == pytest.approx(expected.item(), rel=1e-8)
        assert math.isnan(found.low)
    assert metrics.spectral_residual(Products(C), Products(C)).value == 0
    # summed in another order: nothing but rounding is left
    truth = LowRankTerms(torch.randn(7, 3, 60))
    assert metrics.spectral_residual(truth, Dense(dense(truth))).value == 0
    small = Dense(dense(truth) * (1 + 1e-9))
    assert metrics.spectral_residual(truth, small).value == pytest.approx(1e-9, rel=1e-4)
    assert math.isnan(metrics.spectral_residual(Dense(torch.zeros(60, 60)), truth).value)


def test_dominant_eigenpair(monkeypatch):
    matrix = torch.randn(50, 50)
    matrix = matrix + matrix.T
    exactly = dominant(matrix)
    monkeypatch.setattr(eigenspaces, "DENSE_UP_TO", 0)
    lanczos = dominant(Products(matrix))
    assert lanczos.value == pytest.approx(exactly.value, rel=1e-8)
    assert (lanczos.vector @ exactly.vector).abs().item() == pytest.approx(1, abs=1e-8)
    assert dominant(torch.zeros(50, 50)).value == 0


@pytest.mark.parametrize("of", ["ggn", "hessian"])
def test_inverse_error(classifier, of):
    for truth, approx in pairs(classifier, of):
        eye = LAMBDA * torch.eye(truth.shape[0])
        Q, P = torch.linalg.inv(dense(truth) + eye), torch.linalg.inv(dense(approx) + eye)
        expected = ((P - Q).norm() / Q.norm()).item()
        found = metrics.inverse_error(truth, approx, damping=LAMBDA)
        assert found.value == pytest.approx(expected, rel=1e-8)
        assert 0 <= found.low <= found.value <= found.high
        inside = Dense(dense(approx) + eye)
        again = metrics.inverse_error(truth, inside, damping=LAMBDA, approximation_damping=0.0)
        assert again.value == pytest.approx(expected, rel=1e-8)


def test_preconditioned_share(classifier):
    seen = set()
    for truth, approx in pairs(classifier):
        values = pencil(truth, approx)
        expected = ((values >= 0.5) & (values <= 2)).double().mean().item()
        found = metrics.preconditioned_share(truth, approx, damping=LAMBDA)
        assert found.value == expected
        assert math.isnan(found.low)
        assert found.n == 30
        seen.add(expected)
    assert len(seen) > 5  # the cases tell approximations apart
    indefinite = Dense(torch.diag(torch.tensor([1.0, -1.0])))
    assert metrics.preconditioned_share(Dense(torch.eye(2)), indefinite, damping=0.1).value == 0


def test_stein_divergences(classifier):
    for truth, approx in pairs(classifier):
        values = pencil(truth, approx)
        forward = (values - values.log() - 1).sum().item()
        backward = (1 / values + values.log() - 1).sum().item()
        for B in (approx, Dense(dense(approx))):
            found = metrics.stein_divergence(truth, B, damping=LAMBDA)
            assert found.value == pytest.approx(forward, rel=1e-8)
            assert 0 <= found.low <= found.value <= found.high
            reverse = metrics.stein_divergence_reverse(truth, B, damping=LAMBDA)
            assert reverse.value == pytest.approx(backward, rel=1e-8)
            assert 0 <= reverse.low <= reverse.value <= reverse.high


def test_stein_divergence_is_twice_kullback_leibler(classifier):
    block = classifier.block("0")
    truth, approx = exact.ggn(classifier, block), approximations.kfac(classifier, block)
    zero, eye = torch.zeros(block.d), LAMBDA * torch.eye(block.d)
    C, B = (torch.distributions.MultivariateNormal(zero, dense(m) + eye) for m in (truth, approx))
    for metric, first, second in [
        (metrics.stein_divergence, C, B),
        (metrics.stein_divergence_reverse, B, C),
    ]:
        expected = 2 * torch.distributions.kl_divergence(first, second).item()
        assert metric(truth, approx, damping=LAMBDA).value == pytest.approx(expected, rel=1e-8)


def test_stein_divergence_of_an_indefinite_matrix_is_infinite():
    positive, indefinite = torch.eye(2), torch.diag(torch.tensor([1.0, -1.0]))
    for metric in (metrics.stein_divergence, metrics.stein_divergence_reverse):
        for truth, approx in [(positive, indefinite), (indefinite, positive)]:
            assert metric(Dense(truth), Dense(approx), damping=0.1).value == math.inf
        assert metric(Dense(positive), Diagonal(indefinite.diagonal()), 0.1).value == math.inf


@pytest.mark.parametrize("kind", [LowRankTerms, KroneckerTerms])
@pytest.mark.parametrize("name", ["kronecker", "diagonal", "blocks", "dense", "live"])
def test_thin_truths_by_small_matrices_alone(monkeypatch, name, kind):
    """The route of a truth with fewer columns than rows agrees with the dense one."""
    truth = roots(30, n=5, k=3)
    if kind is KroneckerTerms:
        truth = KroneckerTerms(torch.randn(5, 6), Outer(torch.randn(5, 3, 5)))
    left, right, wide = (torch.randn(s, s + 2) for s in (5, 6, 10))
    B = {
        "kronecker": Kronecker(left @ left.T, right @ right.T),
        "diagonal": Diagonal(torch.rand(30)),
        "blocks": BlockDiagonal(torch.stack([wide @ wide.T] * 3), torch.randperm(30)),
        "dense": Dense(dense(truth) + torch.diag(torch.rand(30))),
        "live": inverse(Kronecker(left @ left.T, right @ right.T)),
    }[name]
    added = 0.0 if name == "live" else LAMBDA
    four = [
        metrics.inverse_error,
        metrics.preconditioned_share,
        metrics.stein_divergence,
        metrics.stein_divergence_reverse,
    ]
    densely = [m(truth, B, LAMBDA, added) for m in four]
    values = pencil(truth, B, added)
    assert densely[1].value == ((values >= 0.5) & (values <= 2)).double().mean().item()
    monkeypatch.setattr(pencils, "DENSE_UP_TO", 0)
    monkeypatch.setattr(pencils, "dense", None)  # not to be called
    for metric, expected in zip(four, densely, strict=True):
        found = metric(truth, B, LAMBDA, added)
        ends = [(found.value, expected.value), (found.low, expected.low)]
        for one, other in [*ends, (found.high, expected.high)]:
            # the trace of Q·B is a difference over λ: a few digits are lost
            assert one == pytest.approx(other, rel=1e-7, nan_ok=True), metric


def test_counting_eigenvalues_by_inertia():
    truth, B = roots(20, n=3, k=2), Diagonal(torch.rand(20))
    values = pencil(truth, B)
    for end in (0.1, 0.5, 1.01, 2.0, 7.0):
        expected = (values < end).sum().item()
        assert count_below(truth, LAMBDA, B, LAMBDA, end) == expected
    assert 0 < expected < 20


def test_refusals_name_what_to_ask_instead(monkeypatch):
    monkeypatch.setattr(pencils, "BUDGET", 8 * 100)
    for metric in (
        metrics.inverse_error,
        metrics.preconditioned_share,
        metrics.stein_divergence,
        metrics.stein_divergence_reverse,
    ):
        with pytest.raises(ValueError, match=r"needs the dense matrix.*step_quality.*any size"):
            metric(Dense(torch.eye(20)), Dense(torch.eye(20)), damping=0.1)
