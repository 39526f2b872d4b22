"""The best Kronecker products under a constraint, and on the side of the inverse."""

import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import KroneckerSum, Problem, approximations, dense, exact
from kronscope.diag.approximations.best_kronecker_psd import (
    alternate,
    best_kronecker_psd,
    contractions,
    projected,
)
from kronscope.diag.operators import BUDGET, Damped


def indefinite(seed=0, n=6, sizes=(3, 4, 2)):
    """Far targets: the residuals bend the loss both ways."""
    torch.manual_seed(seed)
    inward, hidden, outward = sizes
    model = nn.Sequential(nn.Linear(inward, hidden), nn.Tanh(), nn.Linear(hidden, outward))
    return Problem(model, nn.MSELoss(), torch.randn(n, inward), 9 * torch.randn(n, outward))


def convolution():
    layers = nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)
    targets = 9 * torch.randn(5, 2)
    return Problem(nn.Sequential(*layers), nn.MSELoss(), torch.randn(5, 1, 3, 3), targets)


def least(*factors):
    return min(torch.linalg.eigvalsh(factor)[0].item() for factor in factors)


def tiled(problem, of="hessian"):
    block = problem.block("0")
    o, i = block.single.matrix_shape
    return dense(exact.truth(problem, block, of)).reshape(o, i, o, i)


@pytest.mark.parametrize("of", ["ggn", "empirical_fisher"])
def test_psd_equals_the_unconstrained_best_of_a_semidefinite_truth(classifier, of):
    shared = convolution()
    for problem, block in [
        *((classifier, b) for b in classifier.blocks()),
        (shared, shared.block("0")),
    ]:
        found = approximations.best_kronecker_psd(problem, block, of=of)
        best = approximations.best_kronecker(problem, block, of=of)
        torch.testing.assert_close(dense(found), dense(best), rtol=1e-7, atol=1e-9)
        assert least(found.left, found.right) > -1e-12


def by_gradient(matrix, o, i, starts=4):
    """The least ‖C − XXᵀ ⊗ YYᵀ‖ found by L-BFGS over the roots, from random starts."""
    found = []
    for _ in range(starts):
        X, Y = torch.randn(o, o, requires_grad=True), torch.randn(i, i, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [X, Y], max_iter=400, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def closure(X=X, Y=Y, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (matrix - torch.kron(X @ X.T, Y @ Y.T)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found.append(closure().item())
    return min(found) ** 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_psd_of_an_indefinite_truth_is_as_good_as_descent_finds(seed):
    problem = indefinite(seed)
    block = problem.block("0")
    truth = exact.hessian(problem, block)
    o, i = truth.factor_sizes
    found = approximations.best_kronecker_psd(problem, block, of="hessian")
    best = approximations.best_kronecker(problem, block, of="hessian")
    assert least(found.left, found.right) > -1e-12
    own, free = ((dense(truth) - dense(B)).norm().item() for B in (found, best))
    assert free < own - 1e-3 * dense(truth).norm().item()  # the constraint binds
    assert own <= by_gradient(dense(truth), o, i) * (1 + 1e-6)


def test_psd_of_a_shared_layers_hessian():
    """A dense truth: no terms, the same alternation."""
    problem = convolution()
    block = problem.block("0")
    matrix, (o, i) = dense(exact.hessian(problem, block)), block.single.matrix_shape
    found = approximations.best_kronecker_psd(problem, block, of="hessian")
    assert least(found.left, found.right) > -1e-12
    assert (matrix - dense(found)).norm().item() <= by_gradient(matrix, o, i) * (1 + 1e-6)


def test_psd_of_a_negative_truth_is_zero():
    """C = -G ⊗ A: every semi-definite product is farther away than zero."""
    layer = nn.Sequential(nn.Linear(2, 2, bias=False))
    problem = Problem(
        layer, lambda z, t: (t - z.square().sum(1)).mean(), torch.randn(5, 2), torch.ones(5)
    )
    found = approximations.best_kronecker_psd(problem, problem.block("0"), of="hessian")
    assert dense(found).abs().max() < 1e-12


@pytest.mark.parametrize("make", [indefinite, convolution])
@pytest.mark.parametrize("of", ["hessian", "ggn"])
def test_contractions_of_terms_equal_those_of_the_dense_matrix(make, of):
    """Of a KroneckerTerms, a LowRankTerms and a dense Hessian."""
    problem = make()
    tiles, truth = tiled(problem, of), exact.truth(problem, problem.block("0"), of)
    o, i = problem.block("0").single.matrix_shape
    G, A = torch.randn(o, o), torch.randn(i, i)
    G, A = G + G.T, A + A.T
    found = contractions(truth, o, i)
    torch.testing.assert_close(found.left(A), torch.einsum("oipj,ij->op", tiles, A))
    torch.testing.assert_close(found.right(G), torch.einsum("oipj,op->ij", tiles, G))


def test_psd_polishes_a_leading_term_that_is_not_accurate(monkeypatch):
    """A product with eigenvalues of -1e-4, as an iteration that stopped early leaves them."""
    problem = convolution()
    block = problem.block("0")
    best = approximations.best_kronecker(problem, block).terms[0]
    shifted = best.right - (least(best.right) + 1e-4) * torch.eye(len(best.right))
    rough = KroneckerSum(best.left[None], shifted[None])
    file = sys.modules[best_kronecker_psd.__module__]
    monkeypatch.setattr(file, "leading_kronecker", lambda *_: rough)
    assert least(shifted) < -1e-5
    found = approximations.best_kronecker_psd(problem, block)
    # the alternation stops at a relative growth of 1e-13, its factors then err by the root of that
    torch.testing.assert_close(dense(found), dense(best), rtol=1e-5, atol=1e-6)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 6),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3)),
)
@settings(max_examples=10, deadline=None)
def test_alternation_never_gets_worse(seed, n, sizes):
    """Nor worse than its start, nor better than without the constraint."""
    problem = indefinite(seed, n, sizes)
    block = problem.block("0")
    truth = exact.hessian(problem, block)
    matrix, (o, i) = dense(truth), truth.factor_sizes
    given_, start = contractions(truth, o, i), projected(torch.randn(i, i) + torch.eye(i))
    errors = [(matrix - dense(alternate(given_, start, rounds))).norm() for rounds in (1, 2, 3, 9)]
    slack = 1e-9 * matrix.norm()
    assert all(later <= earlier + slack for earlier, later in pairwise(errors))
    left = projected(given_.left(start)) / start.square().sum().clamp(min=1e-300)
    assert errors[0] <= (matrix - torch.kron(left, start)).norm() + slack
    found = approximations.best_kronecker_psd(problem, block, of="hessian")
    free = approximations.best_kronecker(problem, block, of="hessian")
    own = (matrix - dense(found)).norm()
    assert (matrix - dense(free)).norm() <= own + slack
    assert own <= matrix.norm() + slack
    alone = projected(given_.left(torch.eye(i))) / i  # the best beside the identity, a start
    assert own <= (matrix - torch.kron(alone, torch.eye(i))).norm() + slack
    factors = approximations.kfac(problem, block)  # of the GGN; its input factor is a start
    for scale in (0.1, 1.0, 10.0):
        assert own <= (matrix - scale * dense(factors)).norm() + slack


def test_inverse_beats_every_other_kronecker_at_its_damping(classifier):
    """And no turn of either factor makes it better: it is the optimum."""
    for problem, of in [(classifier, "ggn"), (convolution(), "empirical_fisher")]:
        block = problem.block("0")
        truth, damping = exact.truth(problem, block, of), 0.3
        undone = torch.linalg.inv(dense(Damped(truth, damping)))
        found = approximations.best_inverse_kronecker(problem, block, damping=damping, of=of)
        own = (undone - dense(found)).norm()
        o, i = block.single.matrix_shape
        tiles = undone.reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
        expected = torch.linalg.svdvals(tiles)[1:].norm()
        torch.testing.assert_close(own, expected)
        assert least(found.left, found.right) > 0
        for name in ("kfac", "kfac_reduce", "tkfac", "best_kronecker_psd"):
            other = getattr(approximations, name)(problem, block, of=of)
            left, right = other.left, other.right
            # damped factor by factor, so that the inverse is a Kronecker product again
            split = damping**0.5 * (right.trace() * o / (left.trace() * i)) ** 0.5
            damped = left + damping / split * torch.eye(o), right + split * torch.eye(i)
            assert own < (undone - torch.kron(*(torch.linalg.inv(part) for part in damped))).norm()
        for scale in (1e-3, 1e-1):
            for _ in range(5):
                left = found.left + scale * torch.randn(o, o)
                right = found.right + scale * torch.randn(i, i)
                assert own < (undone - torch.kron(left, right)).norm()


def test_inverse_of_a_kronecker_truth_in_closed_form():
    """One squared error, inputs ±e_j: C = (2/2) I ⊗ diag; its damped inverse is Kronecker too."""
    inputs = torch.diag(torch.tensor([3.0, 1.0]))
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    problem = Problem(model, nn.MSELoss(), inputs, torch.zeros(2, 2))
    found = approximations.best_inverse_kronecker(problem, problem.block("0"), damping=0.5)
    expected = torch.kron(torch.eye(2), torch.diag(1 / torch.tensor([5.0, 1.0])))
    torch.testing.assert_close(dense(found), expected)


def test_inverse_refuses(classifier):
    block = classifier.block("0")
    with pytest.raises(ValueError, match=r"damping must not be negative, but is -1\.0"):
        approximations.best_inverse_kronecker(classifier, block, damping=-1.0)
    with pytest.raises(ValueError, match="is not one matrix"):
        approximations.best_inverse_kronecker(classifier, classifier.group("all", [""]))
    wide = int((BUDGET / 8) ** 0.5) + 1
    model = nn.Sequential(nn.Linear(wide, 1, bias=False))
    large = Problem(model, nn.MSELoss(), torch.randn(2, wide), torch.randn(2, 1))
    with pytest.raises(ValueError, match=r"4\.0 GiB, over the budget .*; best_kronecker, kfac"):
        approximations.best_inverse_kronecker(large, large.block("0"))
