"""Contract tests over the registry: what an approximation declares is held against the truth."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope import diag
from kronscope.diag import Problem, approximations, dense, exact, metrics
from kronscope.diag.registry import approximation

FOLDER = Path(diag.approximations.__file__).parent
GGN_ONLY = ("kflr", "kfra")  # by BackPACK, which has no Hessian of this kind
CLAIMS = [(entry, case) for entry in approximation.values() for case in entry.exact_on]


@pytest.mark.parametrize(
    ("entry", "name"), CLAIMS, ids=[f"{entry.name}-{case}" for entry, case in CLAIMS]
)
@pytest.mark.parametrize("of", ["ggn", "hessian", "fisher"])
def test_equals_the_truth_where_it_says_so(case, entry, name, of):
    problem, layer = case(name)
    block = problem.block(layer)
    truth = exact.truth(problem, block, of)
    if entry.name in GGN_ONLY and of == "hessian":
        with pytest.raises(ValueError, match=f"{entry.name} approximates the 'ggn'"):
            entry.function(problem, block, of=of)
        return
    approx = entry.function(problem, block, of=of)
    torch.testing.assert_close(dense(approx), dense(truth), rtol=1e-10, atol=1e-12)
    # measured as exact too: 1e-7 because a relative error is the root of a difference of squares
    assert metrics.relative_error(truth, approx).value < 1e-7


def test_nothing_is_missing():
    files = {file.stem for file in FOLDER.glob("[!_]*.py")}
    assert files == {entry.function.__module__.split(".")[-1] for entry in approximation.values()}
    assert len(files) >= 15
    assert len(approximation) >= 23
    assert len(CLAIMS) >= 40


def test_the_entries_are_complete():
    for name, entry in approximation.items():
        assert entry.name == name
        assert entry.of in exact.TRUTHS
        assert entry.kind in ("curvature", "preconditioner")
        assert entry.reference
        assert getattr(approximations, name) is entry.function


@pytest.mark.parametrize("of", ["ggn", "hessian", "empirical_fisher"])
def test_definitions_densely(classifier, of):
    """Each approximation against a construction from its definition."""
    for block in classifier.blocks():
        truth = exact.truth(classifier, block, of)
        matrix, (o, i) = dense(truth), truth.factor_sizes
        a, C = truth.a, truth.C

        def made(name, block=block, **keywords):
            return dense(approximation[name].function(classifier, block, of=of, **keywords))

        torch.testing.assert_close(made("diagonal"), torch.diag(matrix.diagonal()))
        A = torch.stack([torch.outer(x, x) for x in a]).mean(0)
        torch.testing.assert_close(made("kfac"), torch.kron(C.mean(0), A))
        same_output = torch.kron(torch.eye(o), torch.ones(i, i))
        torch.testing.assert_close(made("mini_block"), matrix * same_output)
        same_input = torch.kron(torch.ones(o, o), torch.eye(i))
        torch.testing.assert_close(made("mini_block_input"), matrix * same_input)
        tiles = matrix.reshape(o, i, o, i)
        mean_tile = torch.stack([tiles[k, :, k, :] for k in range(o)]).mean(0)
        torch.testing.assert_close(made("mini_block_shared"), torch.kron(torch.eye(o), mean_tile))
        torch.testing.assert_close(made("groups"), matrix)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_best_kronecker_equals_the_svd_of_the_rearranged_matrix(classifier, rank):
    for of in ("ggn", "hessian"):
        for block in classifier.blocks():
            truth = exact.truth(classifier, block, of)
            matrix, (o, i) = dense(truth), truth.factor_sizes
            tiles = matrix.reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
            U, s, V = torch.linalg.svd(tiles, full_matrices=False)
            best = (U[:, :rank] * s[:rank]) @ V[:rank]
            expected = best.reshape(o, o, i, i).transpose(1, 2).reshape(o * i, o * i)
            found = approximations.best_kronecker(classifier, block, rank=rank, of=of)
            torch.testing.assert_close(
                dense(found), expected, rtol=0, atol=1e-9 * matrix.abs().max().item()
            )
            error = metrics.relative_error(truth, found).value * matrix.norm()
            assert error == pytest.approx(s[rank:].square().sum().sqrt().item(), rel=1e-6, abs=1e-9)


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 12),
    sizes=st.lists(st.integers(1, 5), min_size=3, max_size=4),
    of=st.sampled_from(["ggn", "hessian", "empirical_fisher"]),
)
@settings(max_examples=12, deadline=None)
def test_inequalities(seed, n, sizes, of):
    """Best Kronecker <= KFAC; finer blocks are never better; more terms are never worse."""
    torch.manual_seed(seed)
    layers = []
    for inward, outward in pairwise(sizes):
        layers += [nn.Linear(inward, outward), nn.Tanh()]
    problem = Problem(
        nn.Sequential(*layers[:-1]),
        nn.MSELoss(),
        torch.randn(n, sizes[0]),
        torch.randn(n, sizes[-1]),
    )
    for block in problem.blocks():
        truth = exact.truth(problem, block, of)

        def error(name, block=block, truth=truth, **keywords):
            made = approximation[name].function(problem, block, of=of, **keywords)
            return metrics.relative_error(truth, made).value

        slack = 1e-7  # the root of rounding in a difference of squares
        assert error("best_kronecker") <= error("kfac") + slack
        assert error("best_kronecker") <= error("mini_block_shared") + slack
        assert error("mini_block") <= error("diagonal") + slack
        assert error("mini_block_input") <= error("diagonal") + slack
        assert error("mini_block") <= error("mini_block_shared") + slack
        assert error("best_kronecker", rank=2) <= error("best_kronecker") + slack
        made = approximations.kfac(problem, block, of=of)
        assert metrics.excess_over_best_kronecker(truth, made).value >= -slack


def test_kfac_of_one_example_is_the_ggn_block(case):
    problem, layer = case("one_example")
    block = problem.block(layer)
    torch.testing.assert_close(
        dense(approximations.kfac(problem, block)), dense(exact.ggn(problem, block))
    )


def test_groups_keep_each_layer_by_default(classifier):
    group = classifier.group("both", ["0", "2"])
    whole = dense(exact.ggn(classifier, group))
    found = dense(approximations.groups(classifier, group))
    d = classifier.block("0").d
    torch.testing.assert_close(found[:d, :d], whole[:d, :d])
    assert found[:d, d:].abs().max() == 0


def test_refusals(classifier):
    with pytest.raises(ValueError, match="rank must be at least 1, not 0"):
        approximations.best_kronecker(classifier, classifier.block("0"), rank=0)
    with pytest.raises(ValueError, match=r"no approximation 'kfca'; known: \['best_inverse_k"):
        approximation["kfca"]
    with pytest.raises(ValueError, match=r"'layer_blocks' was removed; use groups\(problem, block"):
        approximation["layer_blocks"]
    with pytest.raises(AttributeError, match=r"use diagonal.*of='fisher'"):
        approximations.diagonal_fisher  # noqa: B018
    group = classifier.group("both", ["0", "2"])
    for name in ("kfac", "mini_block", "mini_block_shared", "mini_block_input"):
        with pytest.raises(ValueError, match=f"{name} needs a Linear layer.*'both'"):
            approximation[name].function(classifier, group)
    with pytest.raises(ValueError, match="is not one matrix"):
        approximations.best_kronecker(classifier, group)
