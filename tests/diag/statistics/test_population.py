"""Unbiased moments against pairs counted by hand, their variances against the jackknife."""

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import Dense, Kronecker, Problem, approximations, dense, exact, metrics
from kronscope.diag.metrics import population_cosine, population_error, population_norm
from kronscope.diag.statistics.intervals import bootstrap_counts
from kronscope.diag.statistics.moments import (
    batch_moments,
    noise,
    pooled,
    unbiased_moments,
    unbiased_square,
    unbiased_squares,
)
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms


def rows_of_a_layer(n, o, i):
    """A truth and its terms [n, d, d], one by one."""
    C, a = torch.randn(n, o, o), torch.randn(n, i)
    C = C + C.mT
    return KroneckerTerms(a, C), torch.stack(
        [torch.kron(c, torch.outer(x, x)) for c, x in zip(C, a, strict=True)]
    )


def roots(n, k, d):
    V = torch.randn(n, k, d)
    return LowRankTerms(V), torch.einsum("nki,nkj->nij", V, V)


def over_pairs(first, second):
    """Mean of <first_n, second_m> over n ≠ m."""
    return sum(
        (first[n] * second[m]).sum().item() for n, m in permutations(range(len(first)), 2)
    ) / (len(first) * (len(first) - 1))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_values_equal_sums_over_pairs(seed, n, first, second):
    torch.manual_seed(seed)
    for truth, terms in (rows_of_a_layer(n, first, second), roots(n, first, second + 1)):
        B = torch.randn(terms.shape[1:])
        B = B + B.T + 3 * terms.mean(0)
        found = unbiased_moments(truth, B, "test")
        square, cross = over_pairs(terms, terms), (terms.mean(0) * B).sum().item()
        error = over_pairs(terms - B, terms - B)
        scale = terms.square().sum((1, 2)).mean().item() + B.square().sum().item()
        for left, right in zip(found[:3], (square, cross, error), strict=True):
            # 1e-12 of the sizes subtracted from one another
            assert left[0].item() == pytest.approx(right, abs=1e-12 * scale)
        if min(square, error) < 1e-3 * scale:  # their roots are compared far from zero
            continue
        assert population_norm(truth).value == pytest.approx(math.sqrt(square), rel=1e-9)
        expected = math.sqrt(error / square)
        assert population_error(truth, B).value == pytest.approx(expected, rel=1e-9)
        each = (terms * B).sum((1, 2))[:, None, None]
        squared = over_pairs(each, each) / square / B.square().sum().item()
        cos = math.copysign(math.sqrt(max(squared, 0)), cross)
        found = population_cosine(truth, B).value
        assert found == pytest.approx(max(min(cos, 1), -1), abs=1e-6)  # a root near zero


@pytest.mark.parametrize("n", [2, 3])
def test_the_mean_over_all_samples_is_the_population_s(n):
    """All 4ⁿ samples with replacement from four terms: unbiased to rounding, not on average."""
    torch.manual_seed(3)
    C, a = torch.randn(4, 2, 2), torch.randn(4, 3)
    whole = KroneckerTerms(a, C + C.mT)
    EC, B = dense(whole), Kronecker(torch.eye(2), torch.randn(3, 3))
    parts = [list(rows) for rows in product(range(4), repeat=n)]
    truths = [KroneckerTerms(a[rows], (C + C.mT)[rows]) for rows in parts]
    found = [unbiased_moments(truth, B, "test") for truth in truths]
    square, error = (sum(m[k][0].item() for m in found) / len(parts) for k in (0, 2))
    assert square == pytest.approx(EC.square().sum().item(), rel=1e-10)
    assert error == pytest.approx((EC - dense(B)).square().sum().item(), rel=1e-10)
    crossed = sum(unbiased_squares(truth, B).cross[0].item() for truth in truths) / len(parts)
    assert crossed == pytest.approx((EC * dense(B)).sum().item() ** 2, rel=1e-10)
    spread = sum((dense(t) - EC).square().sum().item() for t in truths) / len(parts)
    assert sum(noise(t) for t in truths) / len(parts) == pytest.approx(spread, rel=1e-10)
    # the batch's own square is not: it is larger by just that
    own = sum(dense(t).square().sum().item() for t in truths) / len(parts)
    assert own == pytest.approx(square + spread, rel=1e-10)
    assert spread > 0.1 * square


def test_variances_equal_the_jackknife():
    """Delete-one by explicit re-computation; it is larger by (N-1)/(N-2) for each factor U."""
    truth, terms = rows_of_a_layer(8, 2, 3)
    B, n = Kronecker(torch.eye(2), torch.randn(3, 3)), 8
    found = unbiased_moments(truth, B, "test")
    left_out = [[m for m in range(n) if m != k] for k in range(n)]
    squares = torch.tensor([over_pairs(terms[rows], terms[rows]) for rows in left_out])
    crosses = torch.tensor([(terms[rows].mean(0) * dense(B)).sum() for rows in left_out])
    both = torch.stack([squares, crosses])
    jackknife = torch.cov(both) * (n - 1) ** 2 / n
    factor = (n - 1) / (n - 2)
    expected = [jackknife[0, 0] / factor**2, jackknife[0, 1] / factor, jackknife[1, 1]]
    for left, right in zip(found.spread, expected, strict=True):
        assert left[0].item() == pytest.approx(right.item(), rel=1e-9)
    each = (terms * dense(B)).sum((1, 2))[:, None, None]
    crossed = torch.tensor([over_pairs(each[rows], each[rows]) for rows in left_out])
    jackknife = torch.cov(torch.stack([crossed, squares])) * (n - 1) ** 2 / n / factor**2
    expected = [jackknife[0, 0], jackknife[0, 1], jackknife[1, 1]]
    for left, right in zip(unbiased_squares(truth, B).spread, expected, strict=True):
        assert left[0].item() == pytest.approx(right.item(), rel=1e-9)


def test_the_batch_s_variances_equal_the_jackknife():
    """That of ‖C‖² itself, pairs n = m included, differs from it by terms of order 1/N."""
    truth, terms = rows_of_a_layer(400, 2, 2)
    B, n = Kronecker(torch.eye(2), torch.eye(2)), 400
    found = batch_moments(truth, B)
    assert found.square[0].item() == pytest.approx(terms.mean(0).square().sum().item(), rel=1e-9)
    left_out = (n * terms.mean(0) - terms) / (n - 1)
    both = torch.stack([left_out.square().sum((1, 2)), (left_out * dense(B)).sum((1, 2))])
    jackknife = torch.cov(both) * (n - 1) ** 2 / n
    expected = [jackknife[0, 0], jackknife[0, 1], jackknife[1, 1]]
    for left, right in zip(found.spread, expected, strict=True):
        assert left[0].item() == pytest.approx(right.item(), rel=5 / n)


def test_a_replicate_counts_pairs_of_distinct_examples():
    truth, terms = rows_of_a_layer(6, 2, 2)
    B = Kronecker(torch.eye(2), torch.randn(2, 2))
    found = unbiased_moments(truth, B, "test")
    for replicate in (0, 17):
        counts = bootstrap_counts(6)[replicate].long()
        drawn = [n for n in range(6) for _ in range(counts[n])]
        pairs = [(n, m) for n in drawn for m in drawn if n != m]
        square = sum((terms[n] * terms[m]).sum().item() for n, m in pairs) / len(pairs)
        cross = (terms[drawn].mean(0) * dense(B)).sum().item()
        assert found.square[1 + replicate].item() == pytest.approx(square, rel=1e-9)
        assert found.cross[1 + replicate].item() == pytest.approx(cross, rel=1e-9)
        error = square - 2 * cross + dense(B).square().sum().item()
        assert found.error[1 + replicate].item() == pytest.approx(error, rel=1e-9)


def test_a_cosine_of_unknown_sign_is_said_to_be_so():
    torch.manual_seed(2)
    C, a = torch.randn(30, 2, 2), torch.randn(30, 2)
    truth = KroneckerTerms(a, C + C.mT + 4 * torch.eye(2))
    C = dense(truth)
    away = torch.randn(4, 4)
    away = away + away.T - (C * (away + away.T)).sum() / C.square().sum() * C
    found = population_cosine(truth, away)
    assert -0.5 < found.low < 0 < found.high < 0.5
    assert metrics.cosine(truth, away).low < 0 < metrics.cosine(truth, away).high
    assert metrics.relative_error_best_scale(truth, away).high == 1
    opposite = population_cosine(truth, -3 * C)
    assert -1 <= opposite.low <= opposite.value <= opposite.high < 0


def test_every_kind_of_truth(classifier):
    inputs = torch.randn(12, 2, 5, 5)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(27, 2))
    shared = Problem(model, nn.CrossEntropyLoss(), inputs, torch.randint(2, (12,)))
    seen = set()
    for problem in (classifier, shared):
        for block in problem.blocks():
            truth = exact.ggn(problem, block)
            seen.add(type(truth))
            approx = approximations.diagonal(problem, block)
            error, cosine = population_error(truth, approx), population_cosine(truth, approx)
            assert 0 <= error.low <= error.value <= error.high
            assert -1 <= cosine.low <= cosine.value <= cosine.high <= 1
            assert error.n == cosine.n == population_norm(truth).n == problem.n
    assert seen == {KroneckerTerms, LowRankTerms}


def test_refusals_and_limits():
    B = Kronecker(torch.eye(2), torch.eye(2))
    one, two, three = (rows_of_a_layer(n, 2, 2)[0] for n in (1, 2, 3))
    for metric in (population_norm, population_error, population_cosine):
        with pytest.raises(
            ValueError, match=f"{metric.__name__} estimates the population.*Dense of 0"
        ):
            metric(Dense(torch.eye(4)), B)
        with pytest.raises(ValueError, match="at least 2 examples, not a KroneckerTerms of 1"):
            metric(one, B)
        assert math.isnan(metric(two, B).low)
        assert metric(three, B).low <= metric(three, B).high


def test_identical_examples_leave_no_doubt():
    C, a = torch.randn(2, 2), torch.randn(3)
    truth = KroneckerTerms(a.expand(9, 3), (C + C.T).expand(9, 2, 2))
    B = Kronecker(torch.eye(2), torch.eye(3))
    for metric in (population_norm, population_error, population_cosine):
        found = metric(truth, B)
        # the terms' spread is rounding, and its size relative to the value 1e-8 after a root
        assert found.high - found.low < 1e-6 * abs(found.value)
    zero = KroneckerTerms(torch.zeros(9, 3), torch.zeros(9, 2, 2))
    assert population_norm(zero).value == population_norm(zero).high == 0


def test_a_truth_that_cannot_be_told_from_zero():
    """Terms of mean zero: where U comes out negative, all that is known is said."""
    torch.manual_seed(2)
    truth, _ = rows_of_a_layer(16, 2, 3)
    B = Kronecker(torch.eye(2), torch.eye(3))
    assert unbiased_square(truth).values[0] < 0
    norm, error, cosine = (
        population_norm(truth),
        population_error(truth, B),
        population_cosine(truth, B),
    )
    assert norm.value == norm.low == 0 < norm.high < math.inf
    assert error.value == error.high == math.inf
    assert error.low == 0
    assert math.isnan(cosine.value)
    assert (cosine.low, cosine.high) == (-1, 1)


def test_pooled_moments_are_the_means():
    parts = [
        unbiased_moments(rows_of_a_layer(9, 2, 2)[0], Dense(torch.randn(4, 4)), "test")
        for _ in "abc"
    ]
    found = pooled(parts)
    assert found.n == 27
    for k in range(3):
        assert found[k][0].item() == pytest.approx(sum(p[k][0].item() for p in parts) / 3)
    for k in range(3):  # of independent parts: a mean's variance is a third of the mean variance
        mean = sum(p.spread[k][0].item() for p in parts) / 3
        assert found.spread[k][0].item() == pytest.approx(mean / 3)
    # replicates drawn by the same counts are not paired
    shifted = (parts[0].square[2] + parts[1].square[1] + parts[2].square[1000]) / 3
    assert found.square[2].item() == pytest.approx(shifted.item())
