"""Fieller's interval with bootstrap quantiles, by search."""

import math

import pytest
import torch

from kronscope.diag import Dense, metrics
from kronscope.diag.statistics.bootstrap_t import Smooth, Variances, quantiles, ratio_interval
from kronscope.diag.statistics.moments import batch_moments
from kronscope.diag.statistics.population import best_scale_estimate
from kronscope.diag.truths.kronecker_terms import KroneckerTerms


def rows_of_a_layer(n, o, i):
    """A truth and its terms [n, d, d], one by one."""
    C, a = torch.randn(n, o, o), torch.randn(n, i)
    C = C + C.mT
    return KroneckerTerms(a, C), torch.stack(
        [torch.kron(c, torch.outer(x, x)) for c, x in zip(C, a, strict=True)]
    )


@pytest.mark.parametrize(("own", "unbounded"), [(2.0, False), (0.05, True)])
def test_the_interval_is_the_set_of_ratios_not_rejected(own, unbounded):
    """Fieller's interval against a search: ratios whose studentised gap is within the quantiles."""
    generator = torch.Generator().manual_seed(5)
    first = own + 0.1 * torch.randn(1001, generator=generator)
    second = 1 + 0.2 * first + 0.1 * torch.randn(1001, generator=generator)
    one = torch.ones(1001)
    spread = Variances(0.01 * one, 0.002 * one, 0.0104 * one)
    top, bottom = Smooth(second, 0 * one, one), Smooth(first, one, 0 * one)
    low, high = ratio_interval(top, bottom, spread)
    ratio = (second[0] / first[0]).item()

    def gap(rho):
        errors = (0.0104 - 2 * rho * 0.002 + rho**2 * 0.01) ** 0.5
        return (second[0].item() - rho * first[0].item()) / errors

    values = second - ratio * first
    width = (0.0104 - 2 * ratio * 0.002 + ratio**2 * 0.01) ** 0.5
    least, greatest = quantiles(values, width * one, 0.0)
    ratios = torch.linspace(-200, 200, 400_001)
    searched = ratios[(least <= gap(ratios)) & (gap(ratios) <= greatest)].tolist()
    if unbounded:
        assert math.isinf(low) or math.isinf(high)
        assert max(abs(searched[0]), abs(searched[-1])) > 199
    else:
        assert searched[0] == pytest.approx(low, abs=2e-3)  # the search's step is 1e-3
        assert searched[-1] == pytest.approx(high, abs=2e-3)


def test_a_replicate_that_knows_nothing_widens_both_ends():
    values = torch.tensor([0.0] + [math.nan] * 100 + [1.0, -1.0] * 450)
    assert quantiles(values, torch.ones(1001), 0.0) == (-math.inf, math.inf)


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


def test_a_plain_tensor_is_an_approximation_too():
    truth, _ = rows_of_a_layer(9, 2, 2)
    B = torch.eye(4)
    first = metrics.relative_error(truth, B)
    assert first == metrics.relative_error(truth, B)
    assert first == metrics.relative_error(truth, Dense(B))
    other = torch.diag(torch.arange(4.0))
    assert metrics.relative_error(truth, other).value != first.value
