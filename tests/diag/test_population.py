"""Unbiased moments against pairs counted by hand, their intervals against inversion by search."""

import gc
import math
from itertools import combinations, permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diag import Dense, Kronecker, Problem, approximations, dense, exact, metrics
from diag.cross_fit import cross_fit, held_out_moments, restricted
from diag.intervals import bootstrap_counts, keep_pair
from diag.metrics import population_cosine, population_error, population_norm
from diag.moments import batch_moments, noise, pooled, unbiased_moments, unbiased_square
from diag.population import best_scale_estimate, error_estimate
from diag.root_mean import RootMean
from diag.sample_mean import SampleMean
from diag.splits import index_split, random_splits, split_floors, split_norms
from diag.studentised import Part, Variances, quantiles, ratio_interval


def rows_of_a_layer(n, o, i):
    """A truth and its terms [n, d, d], one by one."""
    C, a = torch.randn(n, o, o), torch.randn(n, i)
    C = C + C.mT
    return SampleMean(a, C), torch.stack(
        [torch.kron(c, torch.outer(x, x)) for c, x in zip(C, a, strict=True)]
    )


def roots(n, k, d):
    V = torch.randn(n, k, d)
    return RootMean(V), torch.einsum("nki,nkj->nij", V, V)


def over_pairs(first, second):
    """Mean of <first_n, second_m> over n ≠ m."""
    return sum(
        (first[n] * second[m]).sum().item() for n, m in permutations(range(len(first)), 2)
    ) / (len(first) * (len(first) - 1))


@given(st.integers(0, 10_000), st.integers(2, 9), st.integers(1, 3), st.integers(1, 3))
@settings(max_examples=25, deadline=None)
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
        cos = cross / math.sqrt(square) / B.norm().item()
        assert population_cosine(truth, B).value == pytest.approx(max(min(cos, 1), -1), rel=1e-9)


@pytest.mark.parametrize("n", [2, 3])
def test_the_mean_over_all_samples_is_the_population_s(n):
    """All 4ⁿ samples with replacement from four terms: unbiased to rounding, not on average."""
    torch.manual_seed(3)
    C, a = torch.randn(4, 2, 2), torch.randn(4, 3)
    whole = SampleMean(a, C + C.mT)
    EC, B = dense(whole), Kronecker(torch.eye(2), torch.randn(3, 3))
    parts = [list(rows) for rows in product(range(4), repeat=n)]
    truths = [SampleMean(a[rows], (C + C.mT)[rows]) for rows in parts]
    found = [unbiased_moments(truth, B, "test") for truth in truths]
    square, error = (sum(m[k][0].item() for m in found) / len(parts) for k in (0, 2))
    assert square == pytest.approx(EC.square().sum().item(), rel=1e-10)
    assert error == pytest.approx((EC - dense(B)).square().sum().item(), rel=1e-10)
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


@pytest.mark.parametrize(("own", "unbounded"), [(2.0, False), (0.05, True)])
def test_the_interval_is_the_set_of_ratios_not_rejected(own, unbounded):
    """Fieller's interval against a search: ratios whose studentised gap is within the quantiles."""
    generator = torch.Generator().manual_seed(5)
    first = own + 0.1 * torch.randn(1001, generator=generator)
    second = 1 + 0.2 * first + 0.1 * torch.randn(1001, generator=generator)
    one = torch.ones(1001)
    spread = Variances(0.01 * one, 0.002 * one, 0.0104 * one)
    top, bottom = Part(second, 0 * one, one), Part(first, one, 0 * one)
    low, high = ratio_interval(top, bottom, spread)
    ratio = (second[0] / first[0]).item()

    def gap(rho):
        errors = (0.0104 - 2 * rho * 0.002 + rho**2 * 0.01) ** 0.5
        return (second[0].item() - rho * first[0].item()) / errors

    values = second - ratio * first
    width = (0.0104 - 2 * ratio * 0.002 + ratio**2 * 0.01) ** 0.5
    least, greatest = quantiles(values, width * one, 0.0)
    searched = [
        r for r in torch.linspace(-200, 200, 400_001).tolist() if least <= gap(r) <= greatest
    ]
    if unbounded:
        assert math.isinf(low) or math.isinf(high)
        assert max(abs(searched[0]), abs(searched[-1])) > 199
    else:
        assert searched[0] == pytest.approx(low, abs=2e-3)  # the search's step is 1e-3
        assert searched[-1] == pytest.approx(high, abs=2e-3)


def test_a_replicate_that_knows_nothing_widens_both_ends():
    values = torch.tensor([0.0] + [math.nan] * 100 + [1.0, -1.0] * 450)
    assert quantiles(values, torch.ones(1001), 0.0) == (-math.inf, math.inf)


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
    assert seen == {SampleMean, RootMean}


def test_refusals_and_limits():
    B = Kronecker(torch.eye(2), torch.eye(2))
    one, two, three = (rows_of_a_layer(n, 2, 2)[0] for n in (1, 2, 3))
    for metric in (population_norm, population_error, population_cosine):
        with pytest.raises(
            ValueError, match=f"{metric.__name__} speaks of the population.*Dense of 0"
        ):
            metric(Dense(torch.eye(4)), B)
        with pytest.raises(ValueError, match="at least 2 examples, not a SampleMean of 1"):
            metric(one, B)
        assert math.isnan(metric(two, B).low)
        assert metric(three, B).low <= metric(three, B).high


def test_identical_examples_leave_no_doubt():
    C, a = torch.randn(2, 2), torch.randn(3)
    truth = SampleMean(a.expand(9, 3), (C + C.T).expand(9, 2, 2))
    B = Kronecker(torch.eye(2), torch.eye(3))
    for metric in (population_norm, population_error, population_cosine):
        found = metric(truth, B)
        # the terms' spread is rounding, and its size relative to the value 1e-8 after a root
        assert found.high - found.low < 1e-6 * abs(found.value)
    zero = SampleMean(torch.zeros(9, 3), torch.zeros(9, 2, 2))
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


def test_the_best_scale_s_error_is_that_of_the_scaled_approximation():
    """Whatever the scale of B: near and far from the truth, the value and the interval."""
    truth, terms = rows_of_a_layer(40, 2, 3)
    near = terms.mean(0) + 0.01 * torch.randn(6, 6)
    for B in (near + near.T, torch.eye(6)):
        values = []
        for scale in (1.0, 30.0, -2.0):
            found = best_scale_estimate(batch_moments(truth, Dense(scale * B)))
            C = terms.mean(0)
            least = (C - (C * B).sum() / B.square().sum() * B).norm() / C.norm()
            assert found.value == pytest.approx(least.item(), rel=1e-9)
            values.append([found.low, found.high])
        for other in values[1:]:
            assert other == pytest.approx(values[0], rel=1e-6)


def test_a_plain_tensor_is_an_approximation_too_and_is_forgotten():
    truth, _ = rows_of_a_layer(9, 2, 2)
    B = torch.eye(4)
    first = metrics.relative_error(truth, B)
    assert first == metrics.relative_error(truth, B)
    assert first == metrics.relative_error(truth, Dense(B))
    other = torch.diag(torch.arange(4.0))
    assert metrics.relative_error(truth, other).value != first.value
    held = keep_pair(truth, "numbers", other, lambda: 1)
    assert held == keep_pair(truth, "numbers", other, lambda: 2) == 1
    del other
    gc.collect()
    assert keep_pair(truth, "numbers", B, lambda: 3) == 3
    assert len(truth.kept["numbers"]) == 1


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


@pytest.mark.parametrize(("first", "second"), [(2, 3), (1, 4), (2, 2)])
def test_all_splits_together_are_the_sampling_noise(first, second):
    """The mean floor over every split of five examples is the unbiased noise of the batch."""
    truth, terms = rows_of_a_layer(5, 2, 2)
    weights = []
    for one in combinations(range(5), first):
        for two in combinations([n for n in range(5) if n not in one], second):
            weights.append(index_split(5, one, two))
            gap = terms[list(one)].mean(0) - terms[list(two)].mean(0)
            found = split_norms(truth, weights[-1]).item()
            assert found == pytest.approx(gap.square().sum().item(), rel=1e-9)
    floors = split_floors(truth, torch.cat(weights))
    expected = noise(truth) / dense(truth).square().sum().item()
    assert floors.mean().item() == pytest.approx(expected, rel=1e-9)


def test_noise_floor_of_any_split():
    truth, _ = rows_of_a_layer(60, 2, 2)
    halves = metrics.noise_floor(truth)
    fifth = metrics.noise_floor(truth, weights=random_splits(60, 12, 48, 400))
    assert fifth.value == pytest.approx(halves.value, rel=0.05)  # 400 splits: about 1 %
    exactly = math.sqrt(noise(truth)) / dense(truth).norm().item()
    assert halves.value == pytest.approx(exactly, rel=0.05)
    single = metrics.noise_floor(truth, weights=index_split(60, range(30), range(30, 60)))
    assert math.isnan(single.low)


def test_splits_refuse_what_is_no_split():
    for first, second in (([], [1]), ([0, 1], [1]), ([0, 0], [1])):
        with pytest.raises(ValueError, match="two sets of examples that share none"):
            index_split(4, first, second)
    with pytest.raises(ValueError, match=r"examples are 0\.\.3; the split names 1\.\.4"):
        index_split(4, [1], [4])
    with pytest.raises(ValueError, match="cannot draw 5 splits into 3 and 2 of 4 examples"):
        random_splits(4, 3, 2, 5)


def test_cross_fit_equals_its_definition(classifier):
    block = classifier.block("2")
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4))
    squares, errors = [], []
    for held_out in order.tensor_split(3):
        rest = torch.tensor([n for n in order.tolist() if n not in held_out])
        built = approximations.kfac(restricted(classifier, rest), block)
        truth = exact.ggn(restricted(classifier, held_out), block)
        a, C = truth.a, truth.C
        terms = torch.stack([torch.kron(c, torch.outer(x, x)) for c, x in zip(C, a, strict=True)])
        squares.append(over_pairs(terms, terms))
        errors.append(over_pairs(terms - dense(built), terms - dense(built)))
    generator = torch.Generator().manual_seed(4)
    found = cross_fit(classifier, block, approximations.kfac, folds=3, generator=generator)
    assert found.value == pytest.approx(math.sqrt(sum(errors) / sum(squares)), rel=1e-9)
    assert found.low <= found.value <= found.high
    assert found.n == 30
    generator.manual_seed(4)
    pair = held_out_moments(classifier, block, approximations.kfac, folds=3, generator=generator)
    plain = error_estimate(pair)
    assert found.high > 1.02 * plain.high > plain.high > found.value


def test_cross_fit_of_another_truth_and_refusals(classifier):
    block = classifier.block("0")
    found = cross_fit(
        classifier, block, lambda p, b: approximations.kfac(p, b, of="hessian"), of="hessian"
    )
    assert 0 <= found.low <= found.value <= found.high
    for folds in (1, 16):
        with pytest.raises(ValueError, match=f"folds must be from 2 to 15, not {folds}"):
            cross_fit(classifier, block, approximations.kfac, folds=folds)
    assert not classifier.model.get_parameter("0.weight").requires_grad


def test_cross_fit_is_unbiased_where_the_same_batch_is_not():
    """Mean over batches of (estimate - true ‖E C - B‖²), in standard errors; B as it was built."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    x, t = torch.randn(3000, 3), torch.randint(2, (3000,))
    whole = Problem(model, nn.CrossEntropyLoss(), x, t)
    block = whole.block("0")
    EC = dense(exact.ggn(whole, block))
    crossed, same = [], []
    for _ in range(15):
        part = restricted(whole, torch.randint(3000, (40,)))
        built = []

        def method(problem, block, built=built):
            built.append(approximations.kfac(problem, block))
            return built[-1]

        found = held_out_moments(part, block, method)
        true = sum((EC - dense(B)).square().sum() for B in built) / 2
        crossed.append(found.error[0] - true)
        own = approximations.kfac(part, block)
        naive = unbiased_moments(exact.ggn(part, block), own, "test")
        same.append(naive.error[0] - (EC - dense(own)).square().sum())
    for gaps, low, high in ((crossed, -4, 4), (same, -math.inf, -6)):
        gaps = torch.stack(gaps)
        assert low < (gaps.mean() / gaps.std() * len(gaps) ** 0.5).item() < high
