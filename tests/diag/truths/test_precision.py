"""Both ways to a Gram matrix, budgets that refuse, float32 and the GPU against float64 on a CPU."""

import math

import pytest
import torch
from torch import nn

from kronscope.diag import Dense, Kronecker, Problem, approximations, dense, exact, metrics
from kronscope.diag.registry import metric
from kronscope.diag.spectra.kronecker_rank import best_kronecker_curve
from kronscope.diag.spectra.kronecker_svd import leading_kronecker
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms

TRUTHS = ("ggn", "fisher", "empirical_fisher", "hessian")


@pytest.fixture
def network_of_all():
    """A convolution, a norm and two Linear layers, its numbers representable in float32."""
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )
    x = torch.randn(12, 2, 3, 3, dtype=torch.float32).double()
    return model.float().double(), x, torch.randint(3, (12,))


def problem_of(network, **keywords):
    model, x, t = network
    return Problem(model, nn.CrossEntropyLoss(), x, t, **keywords)


@pytest.mark.parametrize("of", ["ggn", "empirical_fisher"])
def test_grams_by_position_and_through_parameters(network_of_all, monkeypatch, of):
    grams = []
    for by_position in (True, False):
        monkeypatch.setattr(
            "kronscope.diag.truths.low_rank_terms.cheaper_by_position",
            lambda _, way=by_position: way,
        )
        problem = problem_of(network_of_all)  # a new one: truths are kept
        truth = exact.truth(problem, problem.block("0"), of)
        assert isinstance(truth, LowRankTerms)
        assert truth.positions is not None
        grams.append(truth.gram)
    V = truth.V
    expected = torch.einsum("nki,mli->nmkl", V, V).square().sum((2, 3))
    for gram in grams:
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-14)


def test_curvatures_over_the_budget_are_refused_with_the_remedy(network_of_all):
    problem = problem_of(network_of_all)
    problem.budget = 12 * 8 * 40  # bytes; 12 x (5² + 5²) float64 do not fit
    with pytest.raises(ValueError, match=r"12 examples at the 5 outputs of '4' take .* GiB, over"):
        exact.hessian(problem, problem.block("4"))
    with pytest.raises(ValueError, match=r"fewer examples, dtype=torch.float32 or a larger budg"):
        exact.hessian(problem, problem.block("4"))
    assert isinstance(exact.hessian(problem, problem.block("6")), KroneckerTerms)  # 12 x 2 x 3² do


def test_float32_agrees_with_float64(network_of_all):
    single, double = (problem_of(network_of_all, dtype=d) for d in (torch.float32, torch.float64))
    for block in double.blocks():
        for of in TRUTHS:
            found, expected = (exact.truth(problem, block, of) for problem in (single, double))
            matrix = dense(expected)
            assert dense(found).dtype == torch.float32
            # float32 has 7 digits, a few roundings a layer
            slack = 1e-5 * matrix.abs().max().item()
            torch.testing.assert_close(dense(found).double(), matrix, rtol=0, atol=slack)
        found, expected = (exact.ggn(problem, block) for problem in (single, double))
        pairs = [[metrics.noise_floor(truth) for truth in (found, expected)]]
        if block.single.w_bar:
            made = [approximations.kfac(problem, block) for problem in (single, double)]
            assert made[0].left.dtype == torch.float32
            pairs.append(
                [
                    metrics.relative_error(*pair)
                    for pair in zip((found, expected), made, strict=True)
                ]
            )
        for one, other in pairs:
            assert one.value > 1e-3
            for name in ("value", "low", "high"):
                assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4)
            assert one.value == pytest.approx(other.value, rel=1e-5)


def almost_kronecker(gap):
    """a and C in float32 with C_n = G + gap·(what differs); KFAC errs by about the gap."""
    roots, moved = torch.randn(5, 5), torch.randn(20, 5, 5)
    C = roots @ roots.T + gap * (moved + moved.mT)
    return torch.randn(20, 6).float(), C.float()


@pytest.mark.parametrize("gap", [1e-2, 1e-3, 1e-4])
def test_a_small_residual_keeps_its_digits_in_float32(gap):
    a, C = almost_kronecker(gap)
    errors = {}
    for dtype in (torch.float32, torch.float64):
        truth = KroneckerTerms(a.to(dtype), C.to(dtype))
        kfac = Kronecker(truth.left_mean, truth.right_mean)
        errors[dtype] = metrics.relative_error(truth, kfac).value
        matrix = dense(truth)
        if dtype == torch.float64:
            expected = ((matrix - dense(kfac)).norm() / matrix.norm()).item()
            assert errors[dtype] == pytest.approx(expected, rel=1e-9)
    assert errors[torch.float64] < 2 * gap
    # entries are good to 6e-8, so that their deviations are to that over the gap
    assert errors[torch.float32] == pytest.approx(errors[torch.float64], rel=3e-7 / gap)


def test_a_small_residual_of_any_other_pair(network_of_all):
    """Where a difference of squares has no digits left, entries are subtracted."""
    problem = problem_of(network_of_all)
    for name in ("0", "4"):
        truth = exact.ggn(problem, problem.block(name))
        matrix = dense(truth)
        near = matrix * (1 + 1e-6 * torch.rand_like(matrix))
        near = (near + near.T) / 2
        expected = ((matrix - near).norm() / matrix.norm()).item()
        assert metrics.relative_error(truth, Dense(near)).value == pytest.approx(expected, rel=1e-8)


NEAR = [(1.0, 1e-2), (1.0, 1e-3), (1.0, 5e-4), (1.001, 1e-3), (1.1, 1e-3), (1.1, 1e-4)]


@pytest.mark.parametrize("layer", ["0", "4"])
@pytest.mark.parametrize(("scale", "gap"), NEAR)
def test_an_approximation_near_a_float32_truth_but_for_its_scale(network_of_all, layer, scale, gap):
    """Differences of float32's squares would have no digits left: float64 copies are asked."""
    single, double = (problem_of(network_of_all, dtype=d) for d in (torch.float32, torch.float64))
    truth = exact.ggn(single, single.block(layer))
    C = dense(truth).double()
    moved = torch.randn_like(C)
    moved = (moved + moved.T) * C.norm() / (moved + moved.T).norm()
    B = Dense(scale * C + gap * moved)
    cosine = ((C * B.matrix).sum() / C.norm() / B.matrix.norm()).item()
    expected = {
        "relative_error": ((C - B.matrix).norm() / C.norm()).item(),
        "relative_error_best_scale": math.sqrt(1 - cosine**2),
        "population_error": None,
    }
    for name, number in expected.items():
        found = metric[name].function(truth, B)
        if number is not None:
            # entries are good to 6e-8: as much of the gap is rounding of the truth itself
            assert found.value == pytest.approx(number, rel=1e-6 / gap)
        other = metric[name].function(exact.ggn(double, double.block(layer)), B)
        # that is another truth by float32's rounding of the network, a few 1e-7
        for end in ("value", "low", "high"):
            assert getattr(found, end) == pytest.approx(getattr(other, end), rel=0.02, abs=1e-6)


def test_a_truth_too_large_to_copy_keeps_the_digits_it_has(network_of_all, monkeypatch):
    monkeypatch.setattr("kronscope.diag.statistics.intervals.BUDGET", 8 * 100)
    problem = problem_of(network_of_all, dtype=torch.float32)
    truth = exact.ggn(problem, problem.block("0"))
    near = Dense(dense(truth) * 1.01)
    assert metrics.relative_error(truth, near).value == pytest.approx(0.01, rel=1e-2)
    double = exact.ggn(problem_of(network_of_all), problem.block("0"))
    near, matrices = Dense(dense(double) * (1 + 1e-5)), []
    monkeypatch.setattr("kronscope.diag.statistics.intervals.dense", matrices.append)
    with pytest.warns(UserWarning, match="known to about 1e-08 at best; entry by entry"):
        found = metrics.relative_error(double, near).value
    assert found == pytest.approx(1e-5, rel=1e-4)  # squares of 1e-10 among roundings of 1e-16
    assert not matrices


def test_two_means_over_the_same_inputs_are_subtracted_term_by_term(monkeypatch):
    a, C = almost_kronecker(1.0)
    moved = torch.randn_like(C) * 1e-5
    truth, near = KroneckerTerms(a, C), KroneckerTerms(a, C + moved + moved.mT)
    expected = ((dense(truth).double() - dense(near).double()).norm() / dense(truth).norm()).item()
    monkeypatch.setattr("kronscope.diag.statistics.intervals.dense", None)
    assert metrics.relative_error(truth, near).value == pytest.approx(expected, rel=2e-2)


def test_a_nearly_linear_network_in_float32():
    """Squared errors behind a nearly linear layer: C_n hardly differ, KFAC is all but exact."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].weight *= 0.02
        model[0].bias *= 0.02
    network = model.float().double(), torch.randn(30, 4).float().double(), torch.randn(30, 3)
    errors = []
    for dtype in (torch.float32, torch.float64):
        problem = Problem(network[0], nn.MSELoss(), *network[1:], dtype=dtype)
        block = problem.block("0")
        truth, kfac = exact.ggn(problem, block), approximations.kfac(problem, block)
        errors.append(metrics.relative_error(truth, kfac).value)
    assert 1e-5 < errors[1] < 1e-3
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(network_of_all):
    model, x, t = network_of_all
    there = problem_of((model.cuda(), x.cuda(), t.cuda()))
    here = problem_of((model.cpu(), x, t))
    for block in here.blocks():
        for of in TRUTHS:
            found, expected = (exact.truth(problem, block, of) for problem in (there, here))
            matrix = dense(expected)
            assert dense(found).is_cuda
            slack = 1e-10 * matrix.abs().max().item()
            torch.testing.assert_close(dense(found).cpu(), matrix, rtol=0, atol=slack)
        found, expected = (numbers(problem, block) for problem in (there, here))
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-8)


def numbers(problem, block):
    """What is asked of a truth, where the problem is."""
    truth = exact.ggn(problem, block)
    estimates = [metrics.noise_floor(truth)]
    if not block.single.w_bar:
        return [estimates[0].value]
    estimates.append(metrics.relative_error(truth, approximations.kfac(problem, block)))
    best = approximations.best_kronecker(problem, block, rank=2)
    estimates.append(metrics.relative_error(truth, best))
    estimates += best_kronecker_curve(truth, 3)
    found = [end for e in estimates for end in (e.value, e.low, e.high)]
    assert not any(map(math.isnan, found))
    return [*found, *leading_kronecker(truth, 3).left.flatten(1).norm(dim=1).tolist()]


def test_what_is_asked_on_a_gpu_is_defined_here_too(network_of_all):
    problem = problem_of(network_of_all)
    counts = {block.name: len(numbers(problem, block)) for block in problem.blocks()}
    assert counts == {"0": 21, "3": 1, "4": 21, "6": 21}
