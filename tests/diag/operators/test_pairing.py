"""A truth and an approximation: of one size, of one dtype, and remembered while neither changes."""

import gc
import math

import pytest
import torch
from torch import nn

from kronscope import optim
from kronscope.diag import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    KroneckerSum,
    LowRank,
    Problem,
    approximations,
    dense,
    diagonal,
    exact,
    live,
    metrics,
    solve,
)
from kronscope.diag.metrics._partitions import partition_of
from kronscope.diag.operators import SingleStep, like
from kronscope.diag.operators.dtypes import Converted, convert, tensors, versions
from kronscope.diag.operators.eigen import KroneckerEigen, Spectral
from kronscope.diag.operators.pairing import keep_pair
from kronscope.diag.registry import metric

SINGLE, DOUBLE = torch.float32, torch.float64
LAMBDA = 0.2
CASES = ("convolution", "linear")
MADE = {
    "convolution": ("kfac", "diagonal", "low_rank", "mini_block_kernel", "groups"),
    "linear": ("kfac", "ekfac", "mini_block_input", "best_kronecker", "groups"),
}


class Foreign:
    """A map of somebody else's: it has .shape and @, and an entry that tells its dtype."""

    def __init__(self, matrix):
        self.matrix = matrix

    @property
    def shape(self):
        return tuple(self.matrix.shape)

    def __matmul__(self, v):
        return self.matrix @ v


def network(dtype):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    x = torch.randn(20, 1, 3, 3)
    return Problem(model, nn.CrossEntropyLoss(), x, torch.randint(3, (20,)), dtype=dtype)


def block_of(problem, case):
    return problem.block("0" if case == "convolution" else "3")


def keywords(entry, problem, block):
    known = {
        "damping": LAMBDA,
        "gradient": problem.gradient(block),
        "problem": problem,
        "block": block,
    }
    return {name: known[name] for name in entry.needs}


# shapes


@pytest.mark.parametrize("name", sorted(metric))
def test_operators_of_two_blocks_are_refused(name, classifier):
    """Also where a metric asks only for traces or norms, which any two operators have."""
    first, last = classifier.block("0"), classifier.block("4")
    truth, approx = exact.ggn(classifier, first), approximations.kfac(classifier, last)
    given = keywords(metric[name], classifier, first)
    said = rf"{name} compares .* a KroneckerTerms \[35, 35\] with a Kronecker \[15, 15\]"
    for other in (truth, Dense(dense(truth))):
        with pytest.raises(ValueError, match=said.replace("KroneckerTerms", type(other).__name__)):
            metric[name].function(other, approx, **given)
    with pytest.raises(ValueError, match=r"\[35, 35\] with a Tensor \[35, 2\]"):
        metric[name].function(truth, approximation=torch.ones(35, 2), **given)


def test_a_missing_argument_is_named(classifier):
    with pytest.raises(TypeError, match=r"relative_error\(\) missing .* 'approximation'"):
        metrics.relative_error(exact.ggn(classifier, classifier.block("0")))
    with pytest.raises(TypeError, match=r"stein_divergence\(\) got .* 'dampng'"):
        metrics.stein_divergence(torch.eye(2), torch.eye(2), 1.0, dampng=1.0)


# dtypes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", sorted(set(metric) - {"preconditioned_share"}))
def test_a_truth_and_an_approximation_in_two_dtypes(name, case):
    """As in float64 alone, to float32's digits; `preconditioned_share` counts, see below."""
    entry, (whole, half) = metric[name], (network(dtype) for dtype in (DOUBLE, SINGLE))
    block, count = block_of(whole, case), 0
    for approximation in MADE[case]:
        double = getattr(approximations, approximation)(whole, block)
        if name == "excess_over_best_kronecker" and approximation != "kfac":
            continue
        single = convert(double, torch.empty(0, dtype=SINGLE))
        assert like(single).dtype == SINGLE
        assert type(single) is type(double)
        expected = entry.function(exact.ggn(whole, block), double, **keywords(entry, whole, block))
        mixed = [
            entry.function(exact.ggn(half, block), double, **keywords(entry, half, block)),
            entry.function(exact.ggn(whole, block), single, **keywords(entry, whole, block)),
        ]
        for found in mixed:
            # float32 has 7 digits; errors near 0 and divisions by λ lose some of them
            assert found.value == pytest.approx(expected.value, rel=2e-4, abs=2e-4)
            if expected.value > 1e-3:  # where they coincide, rounding decides about an interval
                assert math.isnan(found.low) == math.isnan(expected.low)
            count += 1
    assert count >= 2


@pytest.mark.parametrize("case", CASES)
def test_what_is_no_structure_computes_in_its_own_dtype(case):
    whole, half = (network(dtype) for dtype in (DOUBLE, SINGLE))
    block = block_of(whole, case)
    B = dense(Damped(approximations.kfac(whole, block), 0.1))
    expected = metrics.step_cosine(
        exact.ggn(whole, block), B, LAMBDA, whole.gradient(block), approximation_damping=0.0
    )
    inside = {"damping": LAMBDA, "gradient": half.gradient(block), "approximation_damping": 0.0}
    for made in (B, Dense(B), Inverse(Dense(torch.linalg.inv(B))), Foreign(B)):
        found = metrics.step_cosine(exact.ggn(half, block), made, **inside)
        assert found.value == pytest.approx(expected.value, abs=1e-6)
        assert found.low == pytest.approx(expected.low, abs=1e-5)
    assert metrics.preconditioned_share(exact.ggn(half, block), Foreign(B), LAMBDA).value == (
        metrics.preconditioned_share(exact.ggn(whole, block), B, LAMBDA).value
    )


def test_a_gradient_in_another_dtype():
    whole, half = (network(dtype) for dtype in (DOUBLE, SINGLE))
    block = whole.block("3")
    taken = SingleStep(whole.gradient(block), whole.gradient(block) / 3)
    found = metrics.step_cosine(
        exact.ggn(half, block), taken, LAMBDA, taken.gradient, approximation_damping=0.0
    )
    expected = metrics.step_cosine(
        exact.ggn(whole, block), taken, LAMBDA, taken.gradient, approximation_damping=0.0
    )
    assert found.value == pytest.approx(expected.value, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "own"), [("KFAC", {"likelihood": "categorical"}), ("KBFGS", {})], ids=["KFAC", "KBFGS"]
)
def test_live_curvatures_in_float64_beside_a_float32_truth(name, own):
    """As `live.curvatures` reads them unless told otherwise."""
    half = network(SINGLE)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    optimizer = getattr(optim, name)(model.float(), lr=0.1, damping=LAMBDA, **own)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(half.inputs), half.targets)
        loss.backward()
        return loss

    optimizer.step(closure)
    held = live.curvatures(optimizer)
    for block in half.blocks():
        truth, same = exact.ggn(half, block), live.curvatures(optimizer, dtype=SINGLE)[block.name]
        assert like(held[block.name]).dtype == DOUBLE
        for entry in metric.values():
            given = keywords(entry, half, block)
            found = entry.function(truth, held[block.name], **given)
            if entry.name != "preconditioned_share":
                expected = entry.function(truth, same, **given).value
                assert found.value == pytest.approx(expected, rel=5e-3, abs=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
def test_an_approximation_on_another_device(dtype):
    here, block = network(DOUBLE), network(DOUBLE).block("0")
    there = Dense(dense(exact.ggn(here, block)).to("cuda", dtype))
    for approximation in MADE["convolution"]:
        approx = getattr(approximations, approximation)(here, block)
        assert dense(convert(approx, like(there))).is_cuda
        for name in ("relative_error", "step_cosine", "stein_divergence", "off_block_mass"):
            given = keywords(metric[name], here, block)
            found = metric[name].function(there, approx, **given).value
            expected = metric[name].function(exact.ggn(here, block), approx, **given).value
            assert found == pytest.approx(expected, rel=1e-3, abs=1e-3)


def structures():
    A, B = (m @ m.T + torch.eye(len(m)) for m in (torch.randn(2, 2), torch.randn(3, 3)))
    yield Kronecker(A, B)
    yield KroneckerSum(torch.stack([A, A]), torch.stack([B, B]))
    yield BlockDiagonal(torch.stack([B, B]), torch.randperm(6))
    yield BlockDiagonal([A, B, torch.eye(1)])
    yield Diagonal(torch.rand(6))
    yield LowRank(torch.randn(6, 2))
    yield Dense(torch.kron(A, B), n=4)
    yield KroneckerEigen(torch.linalg.eigh(A)[1], torch.linalg.eigh(B)[1], torch.rand(2, 3))
    yield Spectral(torch.linalg.qr(torch.randn(6, 2))[0], torch.rand(2))
    yield Damped(Kronecker(A, B), 0.5)
    yield Damped(Inverse(Dense(torch.kron(A, B))), 0.5)
    yield Inverse(BlockDiagonal(torch.stack([B, B])))


def test_every_structure_is_converted_and_knows_its_tensors():
    entries, count = torch.empty(0, dtype=SINGLE), 0
    for operator in structures():
        found, v = convert(operator, entries), torch.randn(6)
        assert convert(operator, torch.empty(0)) is operator
        assert dense(found).dtype == diagonal(found).dtype == (found @ v.float()).dtype == SINGLE
        torch.testing.assert_close(dense(found).double(), dense(operator), rtol=1e-5, atol=1e-5)
        assert partition_of(found).tolist() == partition_of(operator).tolist()
        back = convert(found, torch.empty(0))
        torch.testing.assert_close(dense(back), dense(operator), rtol=1e-5, atol=1e-5)
        assert getattr(found, "n", 0) == getattr(operator, "n", 0)
        assert tensors(operator)
        count += 1
    assert count >= 12
    inverse = Inverse(Dense(torch.diag(torch.tensor([2.0, 3.0]))))
    held = convert(inverse, entries)
    assert isinstance(held, Converted)
    assert solve(held, torch.ones(2, dtype=SINGLE)).tolist() == [2.0, 3.0]
    assert convert(held, torch.empty(0)) is inverse


# what is kept


def test_what_is_kept_of_a_pair_ends_with_it(classifier):
    block = classifier.block("0")
    truth = exact.ggn(classifier, block)
    first, other = (Diagonal(torch.ones(block.d)) for _ in range(2))
    held = keep_pair(truth, "numbers", other, lambda: 1)
    assert held == keep_pair(truth, "numbers", other, lambda: 2) == 1
    del other
    gc.collect()
    assert keep_pair(truth, "numbers", first, lambda: 3) == 3
    assert len(truth.kept["numbers"]) == 1


def test_several_metrics_of_one_pair_share_their_numbers(classifier, monkeypatch):
    truth = exact.ggn(classifier, classifier.block("0"))
    asked, inners = [], type(truth).inners
    monkeypatch.setattr(
        type(truth), "inners", lambda self, B: (asked.append(B), inners(self, B))[1]
    )
    single = convert(approximations.kfac(classifier, classifier.block("0")), torch.empty(0).float())
    for approx in (approximations.kfac(classifier, classifier.block("0")), single):
        asked.clear()
        for name in ("relative_error", "cosine", "relative_error_best_scale", "error_over_noise"):
            metric[name].function(truth, approx)
        assert len(asked) == 1


def test_what_is_changed_in_place_is_measured_again(classifier):
    """Plain tensors, structures around tensors that others change, lists of blocks."""
    block = classifier.block("4")
    truth, d = exact.ggn(classifier, block), block.d
    B = torch.eye(d)
    blocks = [torch.eye(d - 2), torch.eye(2)]
    held = [B, Dense(B), Diagonal(B.diagonal()), Damped(Dense(B), 0.0), Foreign(B)]
    held += [Kronecker(B[:3, :3], B[:5, :5]), BlockDiagonal(blocks), Damped(Inverse(Dense(B)), 0.0)]
    for name in ("relative_error", "population_cosine", "trace_ratio"):
        before = [metric[name].function(truth, approx) for approx in held]
        B.mul_(5)
        blocks[1] = 7 * torch.eye(2)
        after = [metric[name].function(truth, approx) for approx in held]
        fresh = [metric[name].function(truth, Dense(dense(approx).clone())) for approx in held]
        for own, then, now in zip(fresh, before, after, strict=True):
            assert now.value == pytest.approx(own.value, rel=1e-12)
            assert name == "population_cosine" or now.value != then.value
        B.div_(5)
        blocks[1] = torch.eye(2)


def test_a_factorisation_does_not_outlive_the_matrix():
    """A Dense keeps its factors; they are those of the matrix it has now."""
    B, g = torch.eye(3), torch.ones(3)
    held = Dense(B)
    for scale in (1.0, 5.0):
        torch.testing.assert_close(solve(held, g), g / scale)
        torch.testing.assert_close(solve(Damped(held, 1.0), g), g / (scale + 1))
        B.mul_(5)


def test_tensors_that_count_no_changes_are_measured_again(classifier):
    truth = exact.ggn(classifier, classifier.block("4"))
    with torch.inference_mode():
        B = torch.eye(15)
        assert versions(Dense(B)) is None
        first = metrics.relative_error(truth, Dense(B)).value
        held = Dense(B)
        assert metrics.relative_error(truth, held).value == first
        B.mul_(5)
        assert metrics.relative_error(truth, held).value != first


EVERY_STEP = {"update_every": 1, "refresh_every": 1}


@pytest.mark.parametrize(
    ("name", "own"),
    [("KFAC", EVERY_STEP | {"likelihood": "categorical"}), ("KBFGS", {}), ("MBF", EVERY_STEP)],
    ids=lambda own: own if isinstance(own, str) else "",
)
def test_an_optimizer_s_live_views_are_read_at_every_look(name, own):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, t = torch.randn(30, 4), torch.randint(3, (30,))
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    truth = exact.ggn(problem, problem.block("0"))
    optimizer = getattr(optim, name)(model, lr=0.1, damping=0.1, **own)

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), t)
        loss.backward()
        return loss

    optimizer.step(closure)
    view, seen = optimizer.preconditioner()["0"], set()
    for _ in range(5):
        found = metrics.relative_error(truth, view).value
        matrix = view @ torch.eye(truth.shape[0])
        assert found == pytest.approx(metrics.relative_error(truth, matrix).value, rel=1e-6)
        seen.add(found)
        optimizer.step(closure)
    assert len(seen) == 5
