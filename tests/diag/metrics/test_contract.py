"""What every metric declares of itself, held against truths and approximations of every kind."""

import math
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from kronscope import diag
from kronscope.diag import Damped, Dense, Estimate, Inverse, LowRank, Problem, dense, exact
from kronscope.diag.operators import inverse
from kronscope.diag.registry import approximation, metric
from kronscope.diag.truths.low_rank_terms import LowRankTerms

LAMBDA = 0.05
APPROXIMATIONS = ("kfac", "diagonal", "mini_block", "mini_block_shared", "best_kronecker")
POPULATION = {"population_norm", "population_error", "population_cosine"}
OTHERWISE_BEST = {"noise_floor"} | POPULATION  # about the truth alone, or about more than the batch
KRONECKER_ONLY = {"excess_over_best_kronecker"}  # best among, and in range for, one product G ⊗ A
SAMPLED_ONLY = {"noise_floor", "error_over_noise"} | POPULATION  # refuse truths without examples
NONE_BEST = {"preconditioned_sharpness"}  # less is only slower
# of a loss that is not quadratic rho is 1 for small steps alone: tests/diag/metrics/test_steps.py
QUADRATIC_ONLY = {"rho"}
ROUNDING = 1e-6  # errors are roots of differences of squares, 1e-8; overlaps divide by gaps


def keywords(entry, problem, block, inside=False):
    known = {
        "damping": LAMBDA,
        "gradient": problem.gradient(block),
        "problem": problem,
        "block": block,
    }
    found = {name: known[name] for name in entry.needs}
    return found | ({"approximation_damping": 0.0} if inside and "damping" in found else {})


def ends(declared):
    """(least, greatest) of a declared range such as "(−∞, 1]"."""
    least, greatest = re.match(r"[\[(](\S+), (\S+?)[\])]", declared).groups()
    return tuple(float(end.replace("−", "-").replace("∞", "inf")) for end in (least, greatest))


def in_range(found, declared):
    least, greatest = ends(declared)
    slack = 1e-9  # rounding
    inside = least - slack <= found.value <= greatest + slack
    if math.isnan(found.low):
        return inside and math.isnan(found.high)
    return inside and least <= found.low <= found.value <= found.high <= greatest


@cache
def layers():
    """Two layers of a small network: means of Kronecker products."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(20, 5), torch.randint(3, (20,)))
    return [(problem, block) for block in problem.blocks()]


@cache
def shared_weights():
    """A layer used at five positions of each example: its exact block is a mean of V Vᵀ."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Flatten(), nn.Linear(20, 3))
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(12, 5, 3), torch.randint(3, (12,)))
    return problem, problem.block("0")


def cases(of):
    return [*layers(), *([shared_weights()] if of != "hessian" else [])]


def test_the_registry_is_complete():
    files = {file.stem for file in Path(diag.metrics.__file__).parent.glob("[!_]*.py")}
    assert files == set(metric)
    assert len(files) >= 22
    for entry in metric.values():
        assert set(entry.needs) <= {"damping", "gradient", "problem", "block"}
        assert ends(entry.range)[0] < ends(entry.range)[1]
        if not entry.best.startswith("none"):
            assert ends(entry.range)[0] <= float(entry.best) <= ends(entry.range)[1]
    for names in (OTHERWISE_BEST, KRONECKER_ONLY, SAMPLED_ONLY, QUADRATIC_ONLY, NONE_BEST):
        assert names <= set(metric)  # an exception is no place to forget a name


@pytest.mark.parametrize(
    "name", sorted(set(metric) - OTHERWISE_BEST - KRONECKER_ONLY - QUADRATIC_ONLY - NONE_BEST)
)
@pytest.mark.parametrize("of", ["ggn", "empirical_fisher"])
def test_the_truth_itself_is_best(name, of):
    entry = metric[name]
    for problem, block in cases(of):
        truth = exact.truth(problem, block, of)
        for same in (truth, Dense(dense(truth))):
            found = entry.function(truth, same, **keywords(entry, problem, block))
            assert found.value == pytest.approx(float(entry.best), abs=ROUNDING)
            assert in_range(found, entry.range)
        held = Inverse(Damped(Dense(dense(truth)), LAMBDA))  # what a perfect optimizer applies
        if "damping" in entry.needs:
            given = keywords(entry, problem, block, inside=True)
            found = entry.function(truth, inverse(held), **given)
            assert found.value == pytest.approx(float(entry.best), abs=ROUNDING)


@pytest.mark.parametrize("name", sorted(KRONECKER_ONLY | QUADRATIC_ONLY))
def test_the_truth_itself_is_best_where_it_is_a_product_and_the_loss_quadratic(case, name):
    problem, layer = case("deep_linear_mse")
    block, entry = problem.block(layer), metric[name]
    for of in ("hessian", "ggn"):
        truth = exact.truth(problem, block, of)
        approx = approximation["kfac"].function(problem, block, of=of)
        found = entry.function(truth, approx, **keywords(entry, problem, block))
        assert found.value == pytest.approx(float(entry.best), abs=ROUNDING)


@pytest.mark.parametrize("name", sorted(metric))
@pytest.mark.parametrize("of", ["ggn", "hessian"])
def test_every_value_is_in_its_range(name, of):
    entry = metric[name]
    count = 0
    for problem, block in cases(of):
        truth = exact.truth(problem, block, of)
        layer = isinstance(truth, LowRankTerms)
        names = ("diagonal",) if layer else APPROXIMATIONS
        made = [approximation[n].function(problem, block, of=of) for n in names]
        if name in KRONECKER_ONLY:
            made = [] if layer else made[:1]
        for approx in [*made, *(() if name in KRONECKER_ONLY else others(block))]:
            found = entry.function(truth, approx, **keywords(entry, problem, block))
            if of == "hessian" and math.isnan(found.value):
                assert entry.name in ("step_quality", "decrease_efficiency")  # no minimum
                continue
            if name in KRONECKER_ONLY:
                found = Estimate(found.value, n=found.n)  # its interval may reach below 0
            assert in_range(found, entry.range), (approx, found)
            assert found.n == problem.n
            count += 1
    assert count >= (2 if name in KRONECKER_ONLY else 8)


def others(block):
    d = block.d
    yield Dense(torch.eye(d))
    yield LowRank(torch.randn(d, 3))


@pytest.mark.parametrize("name", sorted(metric))
def test_a_truth_without_examples_has_a_value_and_no_interval(name):
    (problem, block), entry = layers()[1], metric[name]
    sampled = exact.ggn(problem, block)
    approx = approximation["kfac"].function(problem, block)
    given = keywords(entry, problem, block)
    truth = Dense(dense(sampled))
    if name in SAMPLED_ONLY | KRONECKER_ONLY:
        with pytest.raises(ValueError, match="truth"):
            entry.function(truth, approx, **given)
        return
    found, expected = (entry.function(t, approx, **given) for t in (truth, sampled))
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
