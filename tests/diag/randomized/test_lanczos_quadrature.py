"""Stochastic Lanczos quadrature against dense functions of matrices."""

import math

import pytest
import torch
from torch import Tensor

from kronscope.diag import exact
from kronscope.diag.operators import Damped, Dense, Diagonal, LowRank, dense
from kronscope.diag.randomized import lanczos_quadrature as quadrature
from kronscope.diag.randomized.lanczos_quadrature import lanczos, spectral_density, spectral_sum
from kronscope.diag.spectra.extreme_eigenpairs import top_eigenpairs


def symmetric(k: int) -> Tensor:
    matrix = torch.randn(k, k)
    return matrix + matrix.T


def decaying(d: int, power: float = 2.0) -> Tensor:
    """Matrix [d, d] with eigenvalues j^-power in a random basis."""
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    return basis * torch.arange(1.0, d + 1) ** -power @ basis.T


def signs(d: int, probes: int) -> Tensor:
    return torch.randint(2, (d, probes)) * 2.0 - 1


def test_lanczos_is_a_projection(monkeypatch):
    matrix, starts = symmetric(12), signs(12, 3)
    whole = torch.linalg.eigvalsh(lanczos(matrix, starts, 12))
    for nodes in whole:
        torch.testing.assert_close(nodes, torch.linalg.eigvalsh(matrix))
    part = lanczos(matrix, starts, 5)
    for T, start in zip(part, starts.T, strict=True):
        powers = torch.stack([torch.linalg.matrix_power(matrix, j) @ start for j in range(5)], 1)
        Q = torch.linalg.qr(powers)[0]  # the same Krylov space, from its definition
        expected = torch.linalg.eigvalsh(Q.T @ matrix @ Q)
        torch.testing.assert_close(torch.linalg.eigvalsh(T), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(torch.triu(part, 2), torch.zeros_like(part))
    monkeypatch.setattr("kronscope.diag.randomized.probes.CHUNK_BYTES", 1)
    torch.testing.assert_close(lanczos(matrix, starts, 5), part)


@pytest.mark.parametrize("steps", [4, 12])
def test_quadrature_of_polynomials_is_exact(steps):
    """s nodes integrate powers below 2s: d Σ w θ^j = z·C^j z for each probe."""
    matrix = symmetric(12) / 5
    generator = torch.Generator().manual_seed(3)
    nodes, weights = quadrature.quadrature(matrix, 5, steps, generator)
    generator.manual_seed(3)
    z = quadrature.probe_blocks(matrix, 5, generator)
    z = next(z)
    torch.testing.assert_close(weights.sum(1), torch.ones(5))
    for j in range(1, 8):
        expected = (z * (torch.linalg.matrix_power(matrix, j) @ z)).sum(0)
        torch.testing.assert_close(12 * (weights * nodes**j).sum(1), expected)


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_quadrature_of_an_exhausted_krylov_space(make):
    """A multiple of I ends it after one step; a probe of low rank after rank + 1."""
    nodes, weights = quadrature.quadrature(Diagonal(3 * make(8)), 4, 8)
    torch.testing.assert_close((nodes * weights).sum(1), 3 * make(4))
    assert nodes.isfinite().all()
    low = Damped(LowRank(torch.randn(30, 2)), 0.5)
    logdet = torch.logdet(dense(low)).item()
    seen = spectral_sum(low, torch.log, probes=400, steps=30)
    assert abs(seen.value - logdet) < 4 * seen.standard_error


def test_spectral_sum_equals_dense_functions_when_all_steps_are_taken():
    """Rademacher probes see a diagonal matrix without error: each z·f(C)z is the trace."""
    d = Diagonal(torch.rand(20) + 0.1)
    for function in (torch.log, torch.exp, lambda v: v / (v + 0.3)):
        found = spectral_sum(d, function, probes=3, steps=20)
        assert found.value == pytest.approx(function(d.diagonal).sum().item(), rel=1e-9)
        assert found.high - found.low < 1e-9
        assert found.n == 3


@pytest.mark.slow
def test_spectral_sums_cover(classifier):
    """Log-determinant of a truth: 300 intervals hold it in 95 %.

    Binomial noise of 300 trials is 1.3 %, and t intervals of a skewed quadratic form err a little.
    """
    truth = Damped(Dense(dense(exact.ggn(classifier, classifier.block("2")))), 0.01)
    logdet = torch.logdet(dense(truth)).item()
    found = [
        spectral_sum(truth, torch.log, 8, 15, torch.Generator().manual_seed(seed))
        for seed in range(300)
    ]
    assert 0.90 < sum(e.low <= logdet <= e.high for e in found) / 300 < 0.99
    values = torch.tensor([estimate.value for estimate in found])
    assert abs(values.mean().item() - logdet) < 4 * values.std().item() / 300**0.5


def test_density_equals_the_dense_one(classifier):
    truth = exact.hessian(classifier, classifier.block("0"))
    values = torch.linalg.eigvalsh(dense(truth))
    width = 0.05 * (values[-1] - values[0]).item()
    found = spectral_density(truth, probes=200, steps=35, kernel_width=width)
    z = (found.grid[:, None] - values) / width
    expected = (-z.square() / 2).exp().mean(1) / (width * math.sqrt(2 * math.pi))
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-6)
    inside = ((found.low <= expected) & (expected <= found.high)).double().mean().item()
    assert inside > 0.8  # pointwise 95 %, but neighbouring points err together
    assert (found.density - expected).abs().max() < 0.1 * expected.max()  # 200 probes: 7 %
    assert (found.low >= 0).all()
    assert (found.probes, found.steps, found.kernel_width) == (200, 35, width)


@pytest.mark.slow
def test_density_bars_cover():
    """At three fixed points, 300 seeds: 95 % up to binomial noise (1.3 %) and skewness.

    Where one eigenvalue rules, a probe's density is nearly a χ² of one degree of freedom.
    """
    matrix = symmetric(16)
    values = torch.linalg.eigvalsh(matrix)
    width = 1.0
    held = torch.zeros(3)
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        found = spectral_density(matrix, 30, 16, 200, width, generator)
        rows = torch.tensor([60, 100, 140])
        z = (found.grid[rows, None] - values) / width
        expected = (-z.square() / 2).exp().mean(1) / (width * math.sqrt(2 * math.pi))
        held += (found.low[rows] <= expected) & (expected <= found.high[rows])
    assert (held / 300 > 0.89).all()
    assert (held / 300 < 0.99).all()


@pytest.mark.parametrize("make", [torch.zeros, torch.ones])
def test_density_of_one_eigenvalue(make):
    found = spectral_density(Diagonal(make(9)), probes=2)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-6)
    peak = found.grid[found.density.argmax()].item()
    assert peak == pytest.approx(make(1).item(), abs=found.kernel_width / 10)


def test_density_in_float32():
    matrix = decaying(50, power=1)
    double = spectral_density(matrix, probes=5, steps=50)
    single = spectral_density(Dense(matrix.float()), probes=5, steps=50)
    assert single.density.dtype == torch.float64
    # products rounded to 7 digits move nodes by 1e-7 of a kernel 1e-2 wide
    torch.testing.assert_close(single.density, double.density, rtol=0, atol=1e-3)


def test_quadrature_is_seeded_and_leaves_the_global_generator_alone():
    matrix, state = symmetric(10), torch.get_rng_state()
    first = spectral_sum(matrix, torch.square)
    assert first == spectral_sum(matrix, torch.square)
    other = torch.Generator().manual_seed(1)
    assert first.value != spectral_sum(matrix, torch.square, generator=other).value
    spectral_density(matrix)
    top_eigenpairs(matrix, k=2)
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_do_not_depend_on_the_chunks(monkeypatch):
    matrix = symmetric(10)
    whole = spectral_sum(matrix, torch.exp, probes=7)
    monkeypatch.setattr("kronscope.diag.randomized.probes.CHUNK_BYTES", 8 * 10 * 11 * 3)
    assert spectral_sum(matrix, torch.exp, probes=7).value == pytest.approx(whole.value, rel=1e-12)


def test_quadrature_refusals():
    matrix = symmetric(4)
    with pytest.raises(ValueError, match=r"probes must be at least 2 to tell an error.*not 1"):
        spectral_density(matrix, probes=1)
    with pytest.raises(ValueError, match="steps must be at least 1, not 0"):
        spectral_sum(matrix, torch.log, steps=0)
    with pytest.raises(ValueError, match="kernel_width must be positive, not -1"):
        spectral_density(matrix, kernel_width=-1)
    with pytest.raises(ValueError, match=r"kernel_width of 1e-06 falls between.*at least \d+ poi"):
        spectral_density(matrix, kernel_width=1e-6)
    with pytest.raises(ValueError, match=r"function is not finite at -.*damp the operator"):
        spectral_sum(matrix, torch.log)
    with pytest.raises(ValueError, match="Diagonal is not finite"):
        spectral_sum(Diagonal(torch.tensor([1.0, math.inf])), torch.square)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    matrix = symmetric(100)
    operator = Dense(matrix.cuda())
    assert spectral_density(operator, probes=2, steps=10).density.is_cuda
    found = spectral_sum(operator, torch.square, probes=2, steps=10).value
    expected = spectral_sum(matrix, torch.square, probes=2, steps=10).value
    assert found == pytest.approx(expected, rel=1e-9)
