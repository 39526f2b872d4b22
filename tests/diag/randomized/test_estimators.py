"""Estimators against dense matrices: unbiased, with intervals that cover, exact where they say."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from kronscope.diag import approximations, exact, metrics
from kronscope.diag.operators import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    LowRank,
    dense,
)
from kronscope.diag.randomized.estimators import (
    hutch_pp_trace,
    hutchinson_diagonal,
    hutchinson_trace,
    xtrace,
)
from kronscope.diag.randomized.frobenius import (
    frobenius_squared,
    inner_estimate,
    relative_error_estimate,
)
from kronscope.diag.randomized.probes import (
    ProbeEstimate,
    gaussian,
    over_probes,
    probe_blocks,
    rademacher,
    rooted,
)

SEEDS = 400
TRACES = (hutchinson_trace, hutch_pp_trace, xtrace)
OF_ONE = (*TRACES, hutchinson_diagonal, frobenius_squared)


def symmetric(k: int) -> Tensor:
    matrix = torch.randn(k, k)
    return matrix + matrix.T


def decaying(d: int, power: float = 2.0) -> Tensor:
    """Matrix [d, d] with eigenvalues j^-power in a random basis."""
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    return basis * torch.arange(1.0, d + 1) ** -power @ basis.T


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sweep(estimator: Callable[..., ProbeEstimate], true: float) -> tuple[Tensor, Tensor, float]:
    """Values [SEEDS], standard errors [SEEDS] and the share of intervals that hold the truth."""
    found = [estimator(seeded(seed)) for seed in range(SEEDS)]
    values = torch.tensor([estimate.value for estimate in found])
    errors = torch.tensor([estimate.standard_error for estimate in found])
    return values, errors, sum(e.low <= true <= e.high for e in found) / SEEDS


def unbiased(values: Tensor, true: float) -> bool:
    """Whether the mean is within 4 standard errors (once in 16,000 by chance)."""
    return abs(values.mean().item() - true) < 4 * values.std().item() / len(values) ** 0.5


# Coverage: binomial noise of 400 trials at 95 % is 1.1 %; quadratic forms of 15 signs are skewed
# and their squares more so, which costs t intervals of 20 probes up to 3 %.
COVERS = (0.89, 0.985)


@pytest.mark.parametrize("estimator", [hutchinson_trace, hutch_pp_trace])
@pytest.mark.parametrize("make", [symmetric, decaying])
def test_traces_are_unbiased_and_cover(estimator, make):
    C = make(15)
    probes = 7 if estimator is hutch_pp_trace else 20
    values, errors, share = sweep(lambda g: estimator(C, probes, g), C.trace().item())
    assert unbiased(values, C.trace().item())
    assert COVERS[0] < share < COVERS[1]
    spread = errors.square().mean().sqrt() / values.std()
    assert spread.item() == pytest.approx(1, abs=0.15)  # 400 values: 4 %, more with heavy tails


@pytest.mark.parametrize("make", [symmetric, decaying])
def test_xtrace_is_unbiased_and_nearly_covers(make):
    """Its summands share their sketch, so that the interval is narrow: 85 to 92 % by trial."""
    C = make(30)
    values, errors, share = sweep(lambda g: xtrace(C, 10, g), C.trace().item())
    assert unbiased(values, C.trace().item())
    assert 0.82 < share < COVERS[1]
    assert 0.65 < (errors.square().mean().sqrt() / values.std()).item() < 1.1


@pytest.mark.parametrize("make", [symmetric, partial(decaying, power=8.0)])
def test_xtrace_equals_leaving_probes_out_one_by_one(make):
    C, k, d = make(12), 5, 12
    omega = gaussian(d, k, seeded(2))
    estimates = []
    for i in range(k):
        others = torch.cat([omega[:, :i], omega[:, i + 1 :]], dim=1)
        Q = torch.linalg.qr(C @ others)[0]
        mu = omega[:, i] - Q @ (Q.T @ omega[:, i])
        mu = mu / mu.norm() * (d - k + 1) ** 0.5
        estimates.append((Q.T @ C @ Q).trace() + mu @ C @ mu)
    expected = torch.stack(estimates)
    found = xtrace(C, k, seeded(2))
    assert found.value == pytest.approx(expected.mean().item(), rel=1e-10)
    assert found.standard_error == pytest.approx((expected.std() / k**0.5).item(), rel=1e-8)


def test_hutch_pp_equals_its_definition():
    C, k, d = symmetric(12), 4, 12
    generator = seeded(2)
    S, G = rademacher(d, k, generator), rademacher(d, k, generator)
    Q = torch.linalg.qr(C @ S)[0]
    rest = torch.eye(d) - Q @ Q.T
    each = (Q.T @ C @ Q).trace() + (G.T @ rest @ C @ rest @ G).diagonal()
    found = hutch_pp_trace(C, k, seeded(2))
    assert found.value == pytest.approx(each.mean().item(), rel=1e-10)
    assert found.standard_error == pytest.approx((each.std() / k**0.5).item(), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("estimator", [hutch_pp_trace, xtrace])
def test_sketches_are_exact_below_their_rank(estimator, dtype):
    factor = torch.randn(40, 4, dtype=dtype)
    signs = torch.diag(torch.tensor([1.0, -2.0, 3.0, -1.0], dtype=dtype))
    precision = 1e-5 if dtype == torch.float32 else 1e-10
    for C in (LowRank(factor), Dense(factor @ signs @ factor.T)):
        true, size = dense(C).double().trace().item(), dense(C).double().norm().item()
        for probes in (5, 9, 60):  # 60 > d: the sketch is everything
            found = estimator(C, probes)
            assert found.value == pytest.approx(true, abs=precision * size)
            assert found.standard_error < precision * size
        assert estimator(C, 3).standard_error > 1e-3 * size
    assert estimator(Diagonal(torch.zeros(6, dtype=dtype)), 3).value == 0
    assert estimator(Diagonal(torch.ones(1, dtype=dtype)), 2).value == pytest.approx(1)


def test_xtrace_does_not_mistake_a_small_tail_for_none():
    """1e-7 is below float32's precision next to 1, but a hundred thousand times it is not."""
    C = Damped(LowRank(torch.eye(100_000, 1, dtype=torch.float32)), 1e-7)
    assert xtrace(C, 4).value == pytest.approx(1.01, rel=1e-5)
    assert hutch_pp_trace(C, 4).value == pytest.approx(1.01, rel=1e-5)


def test_sketches_beat_hutchinson_on_a_decaying_spectrum():
    """At 24 products each: Hutchinson 24 probes, Hutch++ 8, XTrace 12."""
    C = decaying(60)
    spread = {}
    for estimator, probes in zip(TRACES, (24, 8, 12), strict=True):
        found = [estimator(C, probes, seeded(seed)).value for seed in range(60)]
        spread[estimator] = torch.tensor(found).std().item()
    assert spread[hutch_pp_trace] < spread[hutchinson_trace] / 4
    assert spread[xtrace] < spread[hutch_pp_trace]


def test_hutchinson_variance_is_the_formula_s():
    C = symmetric(10)
    expected = (2 * (C.square().sum() - C.diagonal().square().sum())).sqrt().item()
    found = hutchinson_trace(C, 20_000)
    assert found.standard_error * 20_000**0.5 == pytest.approx(expected, rel=0.05)


def test_diagonal():
    C = symmetric(12)
    found = [hutchinson_diagonal(C, 10, seeded(seed)) for seed in range(SEEDS)]
    values, errors = (torch.stack(part) for part in list(zip(*found, strict=True))[:2])
    true = C.diagonal()
    assert ((values.mean(0) - true).abs() < 4 * values.std(0) / SEEDS**0.5).all()
    theory = ((C.square().sum(1) - true.square()) / 10).sqrt()
    torch.testing.assert_close(errors.square().mean(0).sqrt(), theory, rtol=0.1, atol=0)
    torch.testing.assert_close(values.std(0), theory, rtol=0.15, atol=0)
    assert found[0].n == 10
    plain = Diagonal(torch.rand(9) + 1e6)
    exactly = hutchinson_diagonal(plain, 5)
    assert torch.equal(exactly.value, plain.diagonal)
    assert (exactly.standard_error == 0).all()


def test_frobenius():
    C = symmetric(15)
    square = C.square().sum().item()
    values, _, share = sweep(lambda g: frobenius_squared(C, 20, g), square)
    assert unbiased(values, square)
    assert COVERS[0] < share < COVERS[1]
    roots, errors, share = sweep(lambda g: rooted(frobenius_squared(C, 20, g)), C.norm().item())
    assert COVERS[0] < share < COVERS[1]
    torch.testing.assert_close(roots, values.sqrt())
    spread = errors.square().mean().sqrt() / roots.std()
    assert spread.item() == pytest.approx(1, abs=0.15)
    assert rooted(frobenius_squared(C, 20_000)).value == pytest.approx(C.norm().item(), rel=0.02)


def test_inner_products():
    C, B = symmetric(15), symmetric(15)
    true = (C * B).sum().item()
    values, _, share = sweep(lambda g: inner_estimate(C, B, 20, g), true)
    assert unbiased(values, true)
    assert COVERS[0] < share < COVERS[1]
    assert inner_estimate(C, C, 5) == frobenius_squared(C, 5)


def test_relative_errors(classifier):
    block = classifier.block("0")
    truth = exact.ggn(classifier, block)
    for name in ("kfac", "mini_block"):
        approx = getattr(approximations, name)(classifier, block)
        true = metrics.relative_error(truth, approx).value
        C, B = Dense(dense(truth)), Dense(dense(approx))
        values, errors, share = sweep(
            lambda g, C=C, B=B: relative_error_estimate(C, B, 40, g), true
        )
        # a ratio of skewed squares: biased by a fraction of its error, which unbiased() would see
        assert abs(values.mean().item() - true) < 0.3 * values.std().item()
        assert 0.85 < share < COVERS[1]
        spread = errors.square().mean().sqrt() / values.std()
        assert spread.item() == pytest.approx(1, abs=0.25)
        whole = relative_error_estimate(truth, approx, 40, seeded(0))
        assert whole.value == pytest.approx(values[0].item(), rel=1e-9)


def test_relative_errors_at_the_ends():
    C = symmetric(6)
    assert relative_error_estimate(C, C) == ProbeEstimate(0.0, 0.0, 0.0, 100, 0.0)
    nothing = Diagonal(torch.zeros(6))
    found = relative_error_estimate(C, nothing)
    assert (found.value, found.standard_error) == (1.0, 0.0)
    undefined = relative_error_estimate(nothing, nothing)
    assert math.isnan(undefined.value)
    assert math.isnan(undefined.low)


@pytest.mark.parametrize("estimator", OF_ONE)
def test_structures_equal_their_dense_form(estimator):
    structures = [
        Kronecker(symmetric(3), symmetric(4)),
        BlockDiagonal(torch.stack([symmetric(3) for _ in range(4)])),
        Damped(LowRank(torch.randn(12, 3)), 0.5),
    ]
    for structure in structures:
        found, expected = estimator(structure, 6), estimator(dense(structure), 6)
        if estimator is hutchinson_diagonal:
            torch.testing.assert_close(found.value, expected.value)
            torch.testing.assert_close(found.standard_error, expected.standard_error)
        else:
            assert found.value == pytest.approx(expected.value, rel=1e-9)
            assert found.standard_error == pytest.approx(expected.standard_error, rel=1e-7)


@pytest.mark.parametrize("estimator", OF_ONE)
def test_float32_operators(estimator):
    C = decaying(20) + torch.eye(20)
    single, double = estimator(C.float(), 8), estimator(C, 8)
    if estimator is hutchinson_diagonal:
        assert single.value.dtype == torch.float64
        torch.testing.assert_close(single.value, double.value, rtol=1e-5, atol=1e-5)
    else:  # products to 7 digits
        assert single.value == pytest.approx(double.value, rel=1e-5)
    mixed = relative_error_estimate(C.float(), Diagonal(C.diagonal()), 8)
    assert mixed.value == pytest.approx(
        relative_error_estimate(C, Diagonal(C.diagonal()), 8).value, rel=1e-5
    )


@pytest.mark.parametrize("estimator", OF_ONE)
def test_chunks_do_not_matter(estimator, monkeypatch):
    C = symmetric(10)
    whole = estimator(C, 9)
    monkeypatch.setattr("kronscope.diag.randomized.probes.CHUNK_BYTES", 8 * 10 * 4)
    sizes = [z.shape[1] for z in probe_blocks(C, 9, None)]
    assert sizes == [4, 4, 1]
    parts = estimator(C, 9)
    if estimator is hutchinson_diagonal:
        torch.testing.assert_close(parts.value, whole.value)
        torch.testing.assert_close(parts.standard_error, whole.standard_error)
    else:
        assert parts.value == pytest.approx(whole.value, rel=1e-10)
        assert parts.standard_error == pytest.approx(whole.standard_error, rel=1e-8)


@pytest.mark.parametrize("estimator", OF_ONE)
def test_seeds(estimator):
    C, state = symmetric(10), torch.get_rng_state()
    first, again = estimator(C, 4), estimator(C, 4)
    other = estimator(C, 4, seeded(1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.as_tensor(first.value), torch.as_tensor(again.value))
    assert not torch.equal(torch.as_tensor(first.value), torch.as_tensor(other.value))
    torch.manual_seed(5)
    assert torch.equal(torch.as_tensor(first.value), torch.as_tensor(estimator(C, 4).value))
    generator = seeded(0)  # one that is passed on goes on
    once, twice = (torch.as_tensor(estimator(C, 4, generator).value) for _ in range(2))
    assert torch.equal(once, torch.as_tensor(first.value))
    assert not torch.equal(once, twice)
    assert first.n == 4


def test_intervals_are_student_s():
    samples = torch.tensor([1.0, 2.0, 4.0])
    found = over_probes(samples)
    error = samples.std().item() / 3**0.5
    assert found.standard_error == pytest.approx(error)
    reach = 4.302653 * error  # the table's t of two degrees of freedom
    assert found.low == pytest.approx(7 / 3 - reach, rel=1e-6)
    assert found.high == pytest.approx(7 / 3 + reach, rel=1e-6)
    assert str(found) == "2.333 [-1.461, 6.128] (n = 3)"
    root = rooted(found)
    assert root.low == 0
    assert root.high == pytest.approx(found.high**0.5)
    assert root.standard_error == pytest.approx(error / 2 / (7 / 3) ** 0.5)


@pytest.mark.parametrize("estimator", OF_ONE)
@pytest.mark.parametrize("probes", [1, 0, -3])
def test_too_few_probes(estimator, probes):
    with pytest.raises(ValueError, match=f"probes must be at least 2.*not {probes}"):
        estimator(symmetric(4), probes)


@pytest.mark.parametrize("estimator", OF_ONE)
def test_what_is_not_finite_is_refused(estimator):
    with pytest.raises(ValueError, match=r"Diagonal is not finite.*overflows torch\.float64"):
        estimator(Diagonal(torch.tensor([1.0, math.inf])), 4)


@pytest.mark.parametrize("estimator", [inner_estimate, relative_error_estimate])
def test_two_operators_must_fit(estimator):
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 2\) and \(3, 3\)"):
        estimator(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"probes must be at least 2.*not 1"):
        estimator(torch.eye(2), torch.eye(2), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("estimator", TRACES)
def test_on_a_gpu(estimator):
    C = decaying(50)
    assert estimator(C.cuda(), 6).value == pytest.approx(estimator(C, 6).value, rel=1e-9)
    assert hutchinson_diagonal(C.cuda(), 6).value.is_cuda
    mixed = relative_error_estimate(C.cuda(), Diagonal(C.diagonal()), 6)
    assert mixed.value == pytest.approx(relative_error_estimate(C, Diagonal(C.diagonal()), 6).value)
