"""Splits of a batch and cross-fitting, against the blocks of the parts one by one."""

import math
from itertools import combinations, permutations

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, approximations, dense, exact, metrics
from kronscope.diag.cross_fit import cross_fit, held_out_moments, restricted
from kronscope.diag.statistics.moments import noise, unbiased_moments
from kronscope.diag.statistics.population import error_estimate
from kronscope.diag.statistics.splits import random_splits, signed_norms, split_floors
from kronscope.diag.truths.kronecker_terms import KroneckerTerms


def rows_of_a_layer(n, o, i):
    """A truth and its terms [n, d, d], one by one."""
    C, a = torch.randn(n, o, o), torch.randn(n, i)
    C = C + C.mT
    return KroneckerTerms(a, C), torch.stack(
        [torch.kron(c, torch.outer(x, x)) for c, x in zip(C, a, strict=True)]
    )


def over_pairs(first, second):
    """Mean of <first_n, second_m> over n ≠ m."""
    return sum(
        (first[n] * second[m]).sum().item() for n, m in permutations(range(len(first)), 2)
    ) / (len(first) * (len(first) - 1))


def split(n, first, second):
    """Weights [1, n] of the split of n examples into the two sets of indices."""
    weights = torch.zeros(1, n)
    weights[0, list(first)] = 1 / len(first)
    weights[0, list(second)] = -1 / len(second)
    return weights


@pytest.mark.parametrize(("first", "second"), [(2, 3), (1, 4), (2, 2)])
def test_all_splits_together_are_the_sampling_noise(first, second):
    """The mean floor over every split of five examples is the unbiased noise of the batch."""
    truth, terms = rows_of_a_layer(5, 2, 2)
    weights = []
    for one in combinations(range(5), first):
        for two in combinations([n for n in range(5) if n not in one], second):
            weights.append(split(5, one, two))
            gap = terms[list(one)].mean(0) - terms[list(two)].mean(0)
            found = signed_norms(truth.gram, weights[-1]).item()
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
    single = metrics.noise_floor(truth, weights=split(60, range(30), range(30, 60)))
    assert math.isnan(single.low)


def test_splits_refuse_what_is_no_split():
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


@pytest.mark.slow
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
