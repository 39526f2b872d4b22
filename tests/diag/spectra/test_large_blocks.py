"""Spectra and solves of large truths on tiny ones, every route forced, against dense float64."""

import math
from itertools import product

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import (
    Damped,
    Dense,
    Diagonal,
    NotSolvedError,
    Problem,
    approximations,
    dense,
    diagonal,
    exact,
    metrics,
    solve,
)
from kronscope.diag.operators.batched import Outer
from kronscope.diag.spectra.kronecker_rank import best_kronecker_curve
from kronscope.diag.spectra.kronecker_svd import leading_kronecker
from kronscope.diag.spectra.lanczos_svd import leading_triples
from kronscope.diag.spectra.preconditioned import preconditioned_extremes, square_root
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms
from kronscope.diag.truths.matrix_free import MatrixFree


def rearranged(matrix, sizes):
    o, i = sizes
    return matrix.reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)


def check_leading_terms(truth, rank, slack):
    """The sum of `rank` terms equals the truncated SVD of the rearranged dense matrix."""
    (o, i), matrix = truth.factor_sizes, dense(truth)
    U, s, V = torch.linalg.svd(rearranged(matrix, (o, i)), full_matrices=False)
    best = ((U[:, :rank] * s[:rank]) @ V[:rank]).reshape(o, o, i, i).transpose(1, 2)
    found = dense(leading_kronecker(truth, rank))
    atol = slack * matrix.abs().max().item()
    torch.testing.assert_close(found, best.reshape(o * i, o * i), rtol=0, atol=atol)


@pytest.mark.parametrize(("of", "thin_up_to"), [*product(["ggn", "hessian"], [2**24, 0])])
def test_kronecker_svd_by_both_routes(classifier, monkeypatch, of, thin_up_to):
    monkeypatch.setattr("kronscope.diag.truths.kronecker_terms.THIN_UP_TO", thin_up_to)
    for block in classifier.blocks():
        truth = exact.truth(classifier, block, of)
        expected = torch.linalg.svdvals(rearranged(dense(truth), truth.factor_sizes))
        found = truth.kronecker_svd.values
        count = min(len(found), len(expected))
        torch.testing.assert_close(  # a Gram matrix squares: half the digits near zero
            found[:count], expected[:count], rtol=0, atol=1e-7 * expected[0].item()
        )
        assert torch.cat([found[count:], expected[count:]]).sum() <= 1e-7 * expected[0]
        for rank in (1, 2, 5):
            check_leading_terms(truth, rank, 1e-9)


@pytest.fixture
def images():
    """A convolution, whose truths are RootMeans, and a Linear layer behind it."""
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(9, 2, 3, 3), torch.randint(3, (9,)))


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_leading_terms_of_a_convolution(images, monkeypatch, rank):
    for of in ("ggn", "empirical_fisher"):
        truth = exact.truth(images, images.block("0"), of)
        assert isinstance(truth, LowRankTerms)
        check_leading_terms(truth, rank, 1e-9)
        full = metrics.relative_error(truth, leading_kronecker(truth, rank)).value
        with monkeypatch.context() as patch:
            patch.setattr("kronscope.diag.spectra.kronecker_svd.REARRANGED_UP_TO", 0)
            # residuals of 1e-4 turn vectors by that over the distance of their values
            check_leading_terms(truth, rank, 1e-2)
            found = metrics.relative_error(truth, leading_kronecker(truth, rank)).value
            assert found == pytest.approx(full, rel=1e-6)  # second order in the residual


@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    inner_size=st.integers(1, 9),
    rank=st.integers(1, 6),
)
@settings(max_examples=80, deadline=None)
def test_leading_triples_of_random_matrices(seed, shape, inner_size, rank):
    torch.manual_seed(seed)
    (m, n), own = shape, min(*shape, inner_size)
    A = torch.randn(m, own) @ torch.randn(own, n)
    found = leading_triples(lambda v: A @ v, lambda u: A.T @ u, torch.randn(n), rank, 1e-10)
    expected, scale = torch.linalg.svdvals(A), torch.linalg.matrix_norm(A, 2).item()
    assert min(rank, own) <= len(found.values) <= min(rank, own + 1)
    sound = min(rank, own)
    torch.testing.assert_close(found.values[:sound], expected[:sound], rtol=0, atol=1e-9 * scale)
    assert (found.values[sound:] <= 1e-9 * scale).all()
    back = found.left[:sound] @ A
    torch.testing.assert_close(
        back, found.values[:sound, None] * found.right[:sound], rtol=0, atol=1e-8 * scale
    )


def test_too_few_lanczos_steps_are_said(monkeypatch):
    A = torch.randn(30, 30)
    monkeypatch.setattr("kronscope.diag.spectra.lanczos_svd.MOST_STEPS", 2)
    with pytest.raises(RuntimeError, match=r"2 Lanczos steps left a residual of .* 3 leading"):
        leading_triples(lambda v: A @ v, lambda u: A.T @ u, torch.randn(30), 3, 1e-10)


def test_the_rank_curve_is_the_error_of_best_kronecker(images):
    for block in images.blocks():
        truth = exact.ggn(images, block)
        curve = best_kronecker_curve(truth, 4)
        assert len(curve) == 4
        for rank, found in enumerate(curve, start=1):
            best = approximations.best_kronecker(images, block, rank=rank)
            error = metrics.relative_error(truth, best).value
            # a root of a difference of squares: 1e-7 near zero
            assert found.value == pytest.approx(error, rel=1e-6, abs=1e-7)
            assert found.low <= found.value <= found.high
            assert found.n == images.n
        assert curve[3].value < curve[0].value


def test_intervals_of_the_rank_curve_shrink_with_more_examples():
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    x, t = torch.randn(1000, 5), torch.randint(3, (1000,))
    widths = []
    for n in (40, 1000):
        problem = Problem(model, nn.CrossEntropyLoss(), x[:n], t[:n])
        curve = best_kronecker_curve(exact.ggn(problem, problem.block("0")), 2)
        widths.append(torch.tensor([found.high - found.low for found in curve]))
        assert (widths[-1] > 0).all()
    assert (widths[1] < 0.5 * widths[0]).all()  # 25 times the examples: a fifth in the limit


def test_a_rank_curve_without_terms_or_factors(images):
    block = images.block("0")
    truth = exact.ggn(images, block)
    bare = best_kronecker_curve(Dense(dense(truth)), 2, block)
    for found, with_terms in zip(bare, best_kronecker_curve(truth, 2), strict=True):
        assert found.value == pytest.approx(with_terms.value, rel=1e-9)
        assert math.isnan(found.low)
        assert math.isnan(found.high)
    with pytest.raises(ValueError, match="ranks must be at least 1, not 0"):
        best_kronecker_curve(truth, 0)
    with pytest.raises(ValueError, match="factor sizes of a Dense truth are unknown"):
        best_kronecker_curve(Dense(dense(truth)), 2)
    group = images.group("both", ["0", "3"])
    with pytest.raises(ValueError, match="is not one matrix"):
        best_kronecker_curve(exact.ggn(images, group), 2, group)


def large_truths():
    """What is solved neither densely nor by structure: few columns, or products alone."""
    root, packed = torch.randn(12, 12), torch.randn(6, 2, 3)
    matrix = root @ root.T
    return {
        "few columns": LowRankTerms(torch.randn(3, 2, 12)),
        "many columns": LowRankTerms(torch.randn(9, 2, 12)),
        "outer": KroneckerTerms(torch.randn(6, 4), Outer(torch.randn(6, 2, 3))),
        "packed": KroneckerTerms(torch.randn(6, 4), packed.mT @ packed),
        "matrix-free": MatrixFree(lambda rows: rows @ matrix, torch.zeros(12), 5),
    }


LARGE = list(large_truths())


@pytest.mark.parametrize("kind", LARGE)
def test_solves_without_a_dense_factor(monkeypatch, kind):
    monkeypatch.setattr("kronscope.diag.truths.solving.DENSE_UP_TO", 0)
    truth, damping = large_truths()[kind], 0.2
    shifted = dense(truth) + damping * torch.eye(12)
    for v in (torch.randn(12), torch.randn(12, 3)):
        found = solve(Damped(truth, damping), v)
        # conjugate gradients: a residual of 1e-10, over a least eigenvalue of 0.2
        torch.testing.assert_close(found, torch.linalg.solve(shifted, v), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["many columns", "packed", "matrix-free"])
def test_what_does_not_converge_is_said(monkeypatch, kind):
    monkeypatch.setattr("kronscope.diag.truths.solving.DENSE_UP_TO", 0)
    monkeypatch.setattr("kronscope.diag.truths.solving.MOST_PRODUCTS", 1)
    with pytest.raises(NotSolvedError, match=r"d = 12, did not reach .* in 1 products; a larger"):
        solve(Damped(large_truths()[kind], 1e-3), torch.randn(12))


@pytest.mark.parametrize("kind", LARGE)
def test_extremes_by_products_and_solves_alone(monkeypatch, kind):
    for limit in (
        "spectra.preconditioned.DENSE",
        "spectra.preconditioned.INVERTED",
        "truths.solving.DENSE",
    ):
        monkeypatch.setattr(f"kronscope.diag.{limit}_UP_TO", 0)
    truth, damping = large_truths()[kind], 0.2
    approximation = Diagonal(diagonal(truth))
    C, B = (dense(Damped(operator, damping)) for operator in (truth, approximation))
    values, vectors = scipy.linalg.eigh(C.numpy(), B.numpy())
    pairs = preconditioned_extremes(truth, damping, square_root(approximation, damping))
    for pair, place in zip(pairs, (0, -1), strict=True):
        # Lanczos pairs have relative residuals of 1e-4, whose square bounds simple eigenvalues
        assert pair.value == pytest.approx(values[place], rel=1e-4)
        turned = abs(pair.x.numpy() @ B.numpy() @ vectors[:, place])
        assert turned == pytest.approx(1, abs=1e-3)
