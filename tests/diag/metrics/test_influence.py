"""Intervals: against finite differences of the metric itself, and against other batches."""

import math

import pytest
import torch
from torch import nn

from kronscope.diag import Dense, Diagonal, Problem, approximations, dense, exact
from kronscope.diag.registry import metric
from kronscope.diag.statistics.intervals import Z
from kronscope.diag.truths.low_rank_terms import LowRankTerms

LAMBDA, STEP = 0.05, 1e-5
FIRST_ORDER = (
    "spectral_residual",
    "inverse_error",
    "stein_divergence",
    "stein_divergence_reverse",
    "step_quality",
    "decrease_efficiency",
    "eigenspace_overlap",
    "secant_consistency",
    "inverse_secant_consistency",
    "step_cosine",
    "preconditioned_sharpness",
)
BOOTSTRAP = ("trace_ratio", "effective_rank", "off_block_mass", "error_over_noise")


def explicit(truth):
    if isinstance(truth, LowRankTerms):
        return truth.V.mT @ truth.V
    o, i = truth.factor_sizes
    terms = torch.einsum("nop,ni,nj->noipj", truth.C, truth.a, truth.a)
    return terms.reshape(truth.n, o * i, o * i)


@pytest.fixture
def pairs(classifier):
    """(truth, approximation, gradient): a mean of Kronecker products, and one of V Vᵀ."""
    block = classifier.block("2")
    layer = exact.ggn(classifier, block), approximations.kfac(classifier, block)
    roots = LowRankTerms(torch.randn(6, 2, 14))
    other = LowRankTerms(roots.V + 0.5 * torch.randn(6, 2, 14))
    return [
        (*layer, classifier.gradient(block)),
        (roots, Dense(dense(other)), torch.randn(14)),
    ]


@pytest.mark.parametrize("name", FIRST_ORDER)
def test_half_widths(pairs, name):
    entry = metric[name]
    for truth, approx, gradient in pairs:
        known = {"damping": LAMBDA, "gradient": gradient}
        keywords = {need: known[need] for need in entry.needs}
        if name == "eigenspace_overlap":
            keywords["k"] = 3

        def value(matrix, approx=approx, keywords=keywords):
            return entry.function(Dense(matrix), approx, **keywords).value

        C = dense(truth)
        influence = [
            (value(C + STEP * (T - C)) - value(C - STEP * (T - C))) / (2 * STEP)
            for T in explicit(truth)
        ]
        half = Z * torch.tensor(influence).norm().item() / truth.n
        found = entry.function(truth, approx, **keywords)
        assert half > 1e-3
        ends = [e for e in (found.low, found.high) if e not in (0.0, 1.0, -1.0)]  # cut ends
        assert ends, name
        for end in ends:
            # central differences: STEP² and rounding / STEP
            assert abs(end - found.value) == pytest.approx(half, rel=1e-5)


def test_no_interval_where_a_norm_has_no_derivative():
    truth = LowRankTerms(torch.randn(5, 2, 9))
    found = metric["secant_consistency"].function(truth, truth, gradient=torch.randn(9))
    assert found.value == 0
    assert math.isnan(found.low)
    assert math.isnan(found.high)


def test_large_truths_claim_no_interval_for_the_eigenspace():
    truth = LowRankTerms(torch.randn(3, 2, 401))
    overlap = metric["eigenspace_overlap"].function
    found = overlap(truth, Diagonal(torch.arange(1.0, 402)), k=2)
    assert 0 < found.value < 1
    assert math.isnan(found.low)


@pytest.mark.slow
def test_intervals_hold_what_other_batches_show(network):
    """A fixed approximation and gradient on many batches: their spread matches the intervals.

    The share of other batches' values inside one batch's 95 % interval is about 0.83 for normal
    noise in both, as much for first-order as for bootstrap intervals.
    """
    model = network([3, 4, 2], nn.Tanh)
    x, t = torch.randn(2400, 3), torch.randint(2, (2400,))
    reference = Problem(model, nn.CrossEntropyLoss(), x, t)
    block = reference.block("0")
    fixed = approximations.mini_block(reference, block)
    known = {"damping": LAMBDA, "gradient": reference.gradient(block)}
    shown = {name: [] for name in (*FIRST_ORDER, *BOOTSTRAP)}
    for rows in torch.arange(2400).split(80):
        part = Problem(model, nn.CrossEntropyLoss(), x[rows], t[rows])
        truth = exact.ggn(part, part.block("0"))
        for name, found in shown.items():
            keywords = {need: known[need] for need in metric[name].needs}
            keywords |= {"k": 3} if name == "eigenspace_overlap" else {}
            found.append(metric[name].function(truth, fixed, **keywords))
    for name, found in shown.items():
        values = torch.tensor([e.value for e in found])
        inside = [((values >= e.low) & (values <= e.high)).double().mean() for e in found]
        share = torch.stack(inside).mean().item()
        assert 0.65 < share < 0.99, (name, share)
