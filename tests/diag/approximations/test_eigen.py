"""KroneckerEigen and Spectral against their dense matrices; the best low-rank approximation."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import Dense, Problem, approximations, dense, exact, metrics
from kronscope.diag.approximations.low_rank import low_rank
from kronscope.diag.operators import (
    BlockDiagonal,
    Damped,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    diagonal,
    frobenius_norm,
    inner,
    inverse,
    solve,
    trace,
)
from kronscope.diag.operators.eigen import KroneckerEigen, Spectral
from kronscope.diag.truths.kronecker_terms import KroneckerTerms


def symmetric(*shape):
    matrix = torch.randn(*shape)
    return matrix + matrix.mT


def basis(k, r=None):
    return torch.linalg.qr(torch.randn(k, k)).Q[:, :r].contiguous()


STRUCTURES = {
    "kronecker_eigen": lambda: KroneckerEigen(basis(2), basis(3), torch.randn(2, 3)),
    "spectral": lambda: Spectral(basis(6, 2), torch.tensor([2.0, -3.0])),
    "spectral_full": lambda: Spectral(basis(6), torch.randn(6)),
}
OTHERS = {
    **STRUCTURES,
    "dense": lambda: Dense(symmetric(6, 6)),
    "kronecker": lambda: Kronecker(symmetric(2, 2), symmetric(3, 3)),
    "kronecker_sum": lambda: KroneckerSum(symmetric(4, 2, 2), symmetric(4, 3, 3)),
    "blocks": lambda: BlockDiagonal(symmetric(2, 3, 3)),
    "diagonal": lambda: Diagonal(torch.randn(6)),
    "low_rank": lambda: LowRank(torch.randn(6, 2)),
    "damped": lambda: Damped(KroneckerEigen(basis(2), basis(3), torch.randn(2, 3)), 0.3),
    "kronecker_terms": lambda: KroneckerTerms(torch.randn(7, 3), symmetric(7, 2, 2)),
}


@pytest.fixture(params=STRUCTURES, name="operator")
def _operator(request):
    return STRUCTURES[request.param]()


def test_dense_forms_by_definition():
    U, W, S = basis(2), basis(3), torch.randn(2, 3)
    rotation = torch.kron(U, W)
    expected = rotation @ torch.diag(S.flatten()) @ rotation.T
    torch.testing.assert_close(dense(KroneckerEigen(U, W, S)), expected)
    V, values = basis(6, 2), torch.tensor([2.0, -3.0])
    expected = sum(x * torch.outer(v, v) for v, x in zip(V.T, values, strict=True))
    torch.testing.assert_close(dense(Spectral(V, values)), expected)


def test_products_diagonal_trace_norm(operator):
    v, many, matrix = torch.randn(6), torch.randn(6, 4), dense(operator)
    assert tuple(operator.shape) == (6, 6)
    torch.testing.assert_close(operator @ v, matrix @ v)
    torch.testing.assert_close(operator @ many, matrix @ many)
    torch.testing.assert_close(diagonal(operator), matrix.diagonal())
    assert trace(operator) == pytest.approx(matrix.trace().item(), abs=1e-12)
    assert frobenius_norm(operator) == pytest.approx(matrix.norm().item(), rel=1e-12)


@pytest.mark.parametrize("other", OTHERS)
def test_inner(operator, other):
    second = OTHERS[other]()
    expected = (dense(operator) * dense(second)).sum().item()
    assert inner(operator, second) == pytest.approx(expected, rel=1e-10, abs=1e-12)
    assert inner(second, operator) == pytest.approx(expected, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_solve(operator, damping):
    v, many = torch.randn(6), torch.randn(6, 3)
    if operator.shape[0] > getattr(operator, "values", v).numel() and not damping:
        with pytest.raises(torch.linalg.LinAlgError, match="singular without damping"):
            solve(operator, v)
        return
    matrix = dense(Damped(operator, damping))
    torch.testing.assert_close(solve(Damped(operator, damping), v), torch.linalg.solve(matrix, v))
    found = solve(Damped(operator, damping), many)
    torch.testing.assert_close(found, torch.linalg.solve(matrix, many))
    undone = dense(inverse(Damped(operator, damping)))
    torch.testing.assert_close(undone, torch.linalg.inv(matrix))


def test_damping_that_meets_an_eigenvalue_is_refused():
    scale = torch.tensor([[1.0, -0.5]])
    with pytest.raises(torch.linalg.LinAlgError, match=r"1 eigenvalues .* damping 0\.5 are zero"):
        solve(Damped(KroneckerEigen(torch.eye(1), torch.eye(2), scale), 0.5), torch.ones(2))
    with pytest.raises(torch.linalg.LinAlgError, match=r"damping 0\.5 cancels an eigenvalue"):
        solve(Damped(Spectral(torch.eye(2), scale[0]), 0.5), torch.ones(2))


def convolution():
    layers = nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    targets = torch.tensor([0, 1, 2, 1])
    return Problem(nn.Sequential(*layers), nn.CrossEntropyLoss(), torch.randn(4, 2, 3, 3), targets)


def best_of_rank(matrix, rank):
    values, vectors = torch.linalg.eigh(matrix)
    kept = values.abs().argsort(descending=True)[:rank]
    return vectors[:, kept] @ torch.diag(values[kept]) @ vectors[:, kept].T


@pytest.mark.parametrize("dense_up_to", [1500, 0])
@pytest.mark.parametrize("of", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize("rank", [1, 5])
def test_low_rank_is_the_truncated_eigendecomposition(
    classifier, monkeypatch, of, rank, dense_up_to
):
    """By all eigenvectors (of the block or of the roots' Gram matrix) and by Lanczos."""
    monkeypatch.setattr(sys.modules[low_rank.__module__], "DENSE_UP_TO", dense_up_to)
    shared = convolution()
    group = classifier.group("both", ["2", "4"])
    for problem, block in [
        (classifier, classifier.block("0")),
        (classifier, group),
        (shared, shared.block("0")),
    ]:
        truth = exact.truth(problem, block, of)
        matrix = dense(truth)
        found = approximations.low_rank(problem, block, rank=rank, of=of)
        assert isinstance(found, LowRank | Spectral)
        # 1e-7: Lanczos vectors at machine precision, eigenvalue gaps of 1e-3 and more
        torch.testing.assert_close(dense(found), best_of_rank(matrix, rank), rtol=0, atol=1e-7)
        left = torch.linalg.eigvalsh(matrix).abs().sort(descending=True).values[rank:]
        error = metrics.relative_error(truth, found).value
        assert error == pytest.approx((left.norm() / matrix.norm()).item(), rel=1e-5, abs=1e-7)


def test_low_rank_keeps_the_sign_of_an_indefinite_truth(classifier):
    block = classifier.block("0")
    found = approximations.low_rank(classifier, block, rank=block.d, of="hessian")
    assert isinstance(found, Spectral)
    assert found.values.min() < -1e-4
    torch.testing.assert_close(dense(found), dense(exact.hessian(classifier, block)))
    assert isinstance(approximations.low_rank(classifier, block, of="ggn"), LowRank)


def test_low_rank_beyond_the_size_is_the_truth(classifier):
    block = classifier.block("4")
    found = approximations.low_rank(classifier, block, rank=10_000)
    torch.testing.assert_close(dense(found), dense(exact.ggn(classifier, block)))
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        approximations.low_rank(classifier, block, rank=0)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 6),
    rank=st.integers(1, 12),
    of=st.sampled_from(["hessian", "ggn", "empirical_fisher"]),
)
@settings(max_examples=10, deadline=None)
def test_more_ranks_are_never_worse(seed, n, rank, of):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 2))
    problem = Problem(model, nn.MSELoss(), torch.randn(n, 3), torch.randn(n, 2))
    block = problem.group("all", [""])
    truth = exact.truth(problem, block, of)

    def error(rank):
        found = approximations.low_rank(problem, block, rank=rank, of=of)
        return metrics.relative_error(truth, found).value

    assert error(rank + 1) <= error(rank) + 1e-7  # the root of rounding in a difference of squares
    assert error(rank) <= 1 + 1e-7
    if of == "empirical_fisher":  # one gradient per example
        assert error(n) < 1e-7
