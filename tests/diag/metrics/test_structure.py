"""Metrics of structure against dense formulas: eigenspaces, traces, ranks, blocks, noise."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronscope.diag import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    approximations,
    dense,
    exact,
    metrics,
)
from kronscope.diag.metrics._partitions import check_partition, outside_gram, partition_of
from kronscope.diag.metrics.error_over_noise import _factors
from kronscope.diag.operators.batched import Diagonals, Outer
from kronscope.diag.registry import approximation
from kronscope.diag.spectra import eigenspaces
from kronscope.diag.spectra.eigenspaces import leading_space, leading_vectors
from kronscope.diag.statistics.intervals import bootstrap_counts
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms

NAMES = ("kfac", "diagonal", "mini_block", "mini_block_input", "mini_block_shared")


def pairs(problem, of="ggn"):
    for block in problem.blocks():
        truth = exact.truth(problem, block, of)
        for name in NAMES:
            yield truth, approximation[name].function(problem, block, of=of)


def roots(d, n=4, k=2):
    return LowRankTerms(torch.randn(n, k, d))


class Products:
    """Nothing but .shape, @ and what says in which dtype."""

    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, matrix):
        self.shape, self._apply = tuple(matrix.shape), lambda v: matrix @ v

    def __matmul__(self, v):
        return self._apply(v)


@given(seed=st.integers(0, 10_000), d=st.integers(2, 12), k=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_eigenspace_overlap_of_generic_matrices(seed, d, k):
    torch.manual_seed(seed)
    X, Y = torch.randn(d, d), torch.randn(d, d)
    U, W = (torch.linalg.eigh(M @ M.T)[1][:, -min(k, d) :] for M in (X, Y))
    expected = (U.T @ W).square().sum() / min(k, d)
    found = metrics.eigenspace_overlap(Dense(X @ X.T), Dense(Y @ Y.T), k=k)
    assert found.value == pytest.approx(expected.item(), abs=1e-9)
    assert 0 <= found.value <= 1


def test_eigenspace_overlap_with_fewer_positive_eigenvalues_and_ties():
    values = torch.tensor([5.0, 4.0, 3.0, -1.0, -2.0, 0.0])
    truth = Dense(torch.diag(values))
    # three positive: the same three are asked of B, whatever k
    assert metrics.eigenspace_overlap(truth, Diagonal(values.flip(0)), k=5).value == 0
    assert metrics.eigenspace_overlap(truth, truth, k=5).value == 1
    # all six of B tie: they hold the space of two, and four directions more
    assert metrics.eigenspace_overlap(truth, Diagonal(torch.ones(6)), k=2).value == pytest.approx(
        2 / 6
    )
    # I ⊗ A: each eigenvalue three times; k = 4 closes at six
    A = torch.diag(torch.tensor([3.0, 2.0]))
    shared = Kronecker(torch.eye(3), A)
    assert leading_space(shared, 4).size == 6
    assert leading_space(shared, 3).size == 3
    assert metrics.eigenspace_overlap(Dense(dense(shared)), shared, k=4).value == pytest.approx(1)
    assert math.isnan(metrics.eigenspace_overlap(Dense(-torch.eye(3)), truth.matrix[:3, :3]).value)
    with pytest.raises(ValueError, match="k must be at least 1, not 0"):
        metrics.eigenspace_overlap(truth, truth, k=0)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_leading_spaces_from_structure_equal_the_dense_ones(k):
    left, right, wide = (torch.randn(s, s) for s in (3, 4, 4))
    blocks = [wide @ wide.T, right @ right.T, (left @ left.T)]
    v = torch.randn(12, 2)
    for operator in (
        Kronecker(left + left.T, right + right.T),
        Diagonal(torch.randn(12)),
        BlockDiagonal(torch.stack([wide @ wide.T, right @ right.T, right + right.T])),
        BlockDiagonal(torch.stack([wide @ wide.T] * 3), torch.randperm(12)),
        BlockDiagonal([*blocks[:2], torch.eye(4)], torch.randperm(12)),
    ):
        space, vectors = leading_space(operator, k), leading_vectors(operator, k)
        assert space.size == vectors.shape[1]
        projected = space.coordinates(v).norm(dim=0)
        torch.testing.assert_close(projected, (vectors.T @ v).norm(dim=0))


def test_eigenspace_overlap_by_products_and_columns(monkeypatch):
    X, Y = torch.randn(70, 90), torch.randn(70, 90)
    C, B = X @ X.T, Y @ Y.T
    expected = metrics.eigenspace_overlap(Dense(C), Dense(B), k=4).value
    truth = roots(70)
    thin = metrics.eigenspace_overlap(Dense(dense(truth)), Dense(B), k=4).value
    assert metrics.eigenspace_overlap(truth, Dense(B), k=4).value == pytest.approx(thin, abs=1e-9)
    monkeypatch.setattr(eigenspaces, "DENSE_UP_TO", 0)
    monkeypatch.setattr("kronscope.diag.spectra.extreme_eigenpairs.DENSE_UP_TO", 0)
    found = metrics.eigenspace_overlap(Products(C), Products(B), k=4)
    # vectors of Lanczos err by the root of the precision over the gap
    assert found.value == pytest.approx(expected, abs=1e-5)
    assert math.isnan(found.low)


@pytest.mark.parametrize("of", ["ggn", "hessian"])
def test_traces_and_effective_ranks(classifier, of):
    for truth, approx in pairs(classifier, of):
        C, B = dense(truth), dense(approx)
        found = metrics.trace_ratio(truth, approx)
        assert found.value == pytest.approx((B.trace() / C.trace()).item(), rel=1e-9)
        values, others = torch.linalg.eigvalsh(C), torch.linalg.eigvalsh(B)
        own, rank = (v.sum() ** 2 / v.square().sum() for v in (values, others))
        alone = metrics.effective_rank(truth)
        assert alone.value == pytest.approx(own.item(), rel=1e-9)
        assert 0 <= alone.low <= alone.value <= alone.high
        ratio = metrics.effective_rank(truth, approx)
        assert ratio.value == pytest.approx((rank / own).item(), rel=1e-9)
        if of == "ggn":
            assert 0 < found.low <= found.value <= found.high
            assert 1 <= alone.value <= truth.shape[0]


def test_effective_rank_counts_equal_directions():
    basis = torch.linalg.qr(torch.randn(8, 8))[0][:, :3]
    assert metrics.effective_rank(Dense(7 * basis @ basis.T)).value == pytest.approx(3)
    assert metrics.effective_rank(roots(9, n=1, k=1)).value == pytest.approx(1)


def explicit(truth):
    """Terms [N, d, d]."""
    if isinstance(truth, LowRankTerms):
        return truth.V.mT @ truth.V
    o, i = truth.factor_sizes
    terms = torch.einsum("nop,ni,nj->noipj", truth.C, truth.a, truth.a)
    return terms.reshape(truth.n, o * i, o * i)


@given(seed=st.integers(0, 10_000), o=st.integers(1, 4), i=st.integers(1, 4), of=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_off_block_mass_of_random_partitions(seed, o, i, of):
    """Grids of groups, and partitions that are none, for each kind of per-example terms."""
    torch.manual_seed(seed)
    n, d = 5, o * i
    C, a = torch.randn(n, o, o), torch.randn(n, i)
    stacks = [C + C.mT, Outer(torch.randn(n, 2, o)), Diagonals(torch.randn(n, o))]
    truth = LowRankTerms(torch.randn(n, 2, d)) if of == 3 else None
    truth = Dense(torch.randn(d, d)) if of == 4 else truth or KroneckerTerms(a, stacks[of % 3])
    rows, columns = torch.randint(3, (o,)), torch.randint(3, (i,))
    grid = (rows[:, None] * 3 + columns).reshape(-1)
    for parts in (grid, torch.randint(3, (d,)), torch.arange(d), torch.zeros(d, dtype=torch.long)):
        matrix = dense(truth)
        outside = matrix * (parts[:, None] != parts)
        expected = (outside.norm() / matrix.norm()).item()
        found = metrics.off_block_mass(truth, partition=parts)
        assert found.value == pytest.approx(expected, abs=1e-7)  # the root of a difference
        if grams := outside_gram(truth, check_partition(parts, d)):
            masked = (explicit(truth) * (parts[:, None] != parts)).flatten(1)
            torch.testing.assert_close(grams[0], masked @ masked.T, rtol=1e-9, atol=1e-8)
    assert (of == 4) == (outside_gram(truth, check_partition(grid, d)) is None)


def test_off_block_mass_takes_the_blocks_of_the_approximation(classifier):
    for truth, approx in pairs(classifier):
        best = dense(approx) != 0
        matrix = dense(truth)
        expected = ((matrix * ~best).norm() / matrix.norm()).item()
        found = metrics.off_block_mass(truth, approx)
        assert found.value == pytest.approx(expected, abs=1e-7)
        assert 0 <= found.low <= found.value <= found.high <= 1
    block = classifier.block("0")
    truth = exact.ggn(classifier, block)
    rows = approximations.mini_block(classifier, block)
    least = metrics.relative_error(truth, rows).value  # the exact sub-blocks: no better exists
    assert metrics.off_block_mass(truth, rows).value == pytest.approx(least, abs=1e-7)
    for wrapped in (Damped(rows, 0.1), Inverse(rows)):
        assert torch.equal(partition_of(wrapped), partition_of(rows))


def test_off_block_mass_of_a_group_of_layers(classifier):
    group = classifier.group("both", ["0", "2"])
    truth = exact.ggn(classifier, group)
    blocks = approximations.groups(classifier, group)
    C, d = dense(truth), classifier.block("0").d
    expected = (2 * C[:d, d:].square().sum()).sqrt() / C.norm()
    found = metrics.off_block_mass(truth, blocks)
    assert found.value == pytest.approx(expected.item(), abs=1e-9)
    assert isinstance(truth, LowRankTerms)
    assert found.low < found.value < found.high


def test_off_block_mass_refusals():
    truth = Dense(torch.eye(3))
    parts = torch.tensor([0, 0, 1])
    for keywords in ({}, {"approximation": truth, "partition": parts}):
        with pytest.raises(ValueError, match="needs an approximation with blocks or a partition="):
            metrics.off_block_mass(truth, **keywords)
    for wrong in (parts[:2], parts.double()):
        with pytest.raises(ValueError, match="one for each of the 3 coordinates"):
            metrics.off_block_mass(truth, partition=wrong)


def test_error_over_noise(classifier):
    for truth, approx in pairs(classifier):
        error, floor = metrics.relative_error(truth, approx).value, metrics.noise_floor(truth).value
        found = metrics.error_over_noise(truth, approx)
        assert found.value == pytest.approx(error / floor, rel=1e-9)
        assert 0 <= found.low <= found.value <= found.high
    with pytest.raises(ValueError, match="per-example terms"):
        metrics.error_over_noise(Dense(torch.eye(3)), Dense(torch.eye(3)))


def test_error_over_noise_re_draws_the_noise_without_bias():
    truth = roots(6, n=12)
    terms = explicit(truth).flatten(1)

    def noise(rows):  # the expected square of a mean of N, unbiased
        return (rows - rows.mean(0)).square().sum() / (len(rows) - 1) / len(rows)

    factors = _factors(truth.gram)
    for counts, factor in zip(bootstrap_counts(12)[:20], factors[1:21], strict=True):
        drawn = terms.repeat_interleave(counts.long(), dim=0)
        expected = noise(drawn) / noise(terms) * 12 / 11
        assert factor.item() == pytest.approx(expected.item(), rel=1e-9)
    assert factors[0] == 1
    assert factors[1:].mean().item() == pytest.approx(1, abs=0.05)  # 1000 re-draws
