"""Metrics of the whole matrix against dense formulas: norms, inverses, spectra, structure."""

import math

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diag import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    approximations,
    dense,
    eigenspaces,
    exact,
    metrics,
    pencils,
)
from diag.eigenspaces import dominant, leading_space, leading_vectors
from diag.operators import inverse
from diag.partitions import check_partition, outside_gram, partition_of
from diag.pencils import count_below
from diag.registry import approximation
from diag.root_mean import RootMean
from diag.sample_mean import SampleMean
from diag.stacks import Diagonals, Outer

LAMBDA = 0.05
NAMES = ("kfac", "diagonal", "mini_block", "mini_block_input", "mini_block_shared")


def pairs(problem, of="ggn"):
    for block in problem.blocks():
        truth = exact.truth(problem, block, of)
        for name in NAMES:
            yield truth, approximation[name].function(problem, block, of=of)


def roots(d, n=4, k=2):
    return RootMean(torch.randn(n, k, d))


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
    truth = RootMean(torch.randn(7, 3, 60))
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


@pytest.mark.parametrize("kind", [RootMean, SampleMean])
@pytest.mark.parametrize("name", ["kronecker", "diagonal", "blocks", "dense", "live"])
def test_thin_truths_by_small_matrices_alone(monkeypatch, name, kind):
    """The route of a truth with fewer columns than rows agrees with the dense one."""
    truth = roots(30, n=5, k=3)
    if kind is SampleMean:
        truth = SampleMean(torch.randn(5, 6), Outer(torch.randn(5, 3, 5)))
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


@given(seed=st.integers(0, 10_000), d=st.integers(2, 12), k=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
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
    monkeypatch.setattr("diag.spectrum.DENSE_UP_TO", 0)
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
    if isinstance(truth, RootMean):
        return truth.V.mT @ truth.V
    o, i = truth.factor_sizes
    terms = torch.einsum("nop,ni,nj->noipj", truth.C, truth.a, truth.a)
    return terms.reshape(truth.n, o * i, o * i)


@given(seed=st.integers(0, 10_000), o=st.integers(1, 4), i=st.integers(1, 4), of=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_off_block_mass_of_random_partitions(seed, o, i, of):
    """Grids of groups, and partitions that are none, for each kind of per-example terms."""
    torch.manual_seed(seed)
    n, d = 5, o * i
    C, a = torch.randn(n, o, o), torch.randn(n, i)
    stacks = [C + C.mT, Outer(torch.randn(n, 2, o)), Diagonals(torch.randn(n, o))]
    truth = RootMean(torch.randn(n, 2, d)) if of == 3 else None
    truth = Dense(torch.randn(d, d)) if of == 4 else truth or SampleMean(a, stacks[of % 3])
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
    blocks = approximations.layer_blocks(classifier, group)
    C, d = dense(truth), classifier.block("0").d
    expected = (2 * C[:d, d:].square().sum()).sqrt() / C.norm()
    found = metrics.off_block_mass(truth, blocks)
    assert found.value == pytest.approx(expected.item(), abs=1e-9)
    assert isinstance(truth, RootMean)
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
    from diag.intervals import bootstrap_counts
    from diag.metrics.error_over_noise import _factors

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
