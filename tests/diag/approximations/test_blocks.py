"""Block-diagonal over groups of layers, and diagonals, against masks of the dense truth."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kronscope.diag import Problem, approximations, dense, exact, metrics
from kronscope.diag.backward.likelihoods import likelihood_of


def four_layers():
    """3-2-2-2-2 with an encoder of two layers and a decoder of two."""

    def half(inward):
        return nn.Sequential(nn.Linear(inward, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh())

    model = nn.Sequential()
    model.add_module("encoder", half(3))
    model.add_module("decoder", half(2))
    targets = torch.tensor([0, 1, 1, 0, 1])
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(5, 3), targets)


LAYERS = ["encoder.0", "encoder.2", "decoder.0", "decoder.2"]


def masked(problem, block, partition, of):
    """The dense truth with all entries between layers of different groups set to zero."""
    number = {layer: j for j, part in enumerate(partition) for layer in part}
    owner = torch.cat([torch.full((m.d,), number[m.module]) for m in block.members])
    return dense(exact.truth(problem, block, of)) * (owner[:, None] == owner)


PARTITIONS = [
    ((), [[layer] for layer in LAYERS]),
    ([["encoder"], ["decoder"]], [LAYERS[:2], LAYERS[2:]]),
    ([["encoder"]], [LAYERS[:2], LAYERS[2:3], LAYERS[3:]]),
    (
        [["encoder.0", "decoder.2"], ["decoder.0"]],
        [[LAYERS[0], LAYERS[3]], [LAYERS[1]], [LAYERS[2]]],
    ),
    ([["decoder.2", "encoder"], ["decoder.0"]], [[*LAYERS[:2], LAYERS[3]], [LAYERS[2]]]),
    ([["encoder", "decoder"]], [LAYERS]),
]


@pytest.mark.parametrize("of", ["hessian", "ggn", "empirical_fisher"])
@pytest.mark.parametrize(("parts", "partition"), PARTITIONS)
def test_groups_mask_the_truth(parts, partition, of):
    problem = four_layers()
    block = problem.group("all", ["encoder", "decoder"])
    assert [m.module for m in block.members] == LAYERS
    found = approximations.groups(problem, block, parts, of=of)
    torch.testing.assert_close(dense(found), masked(problem, block, partition, of))
    v = torch.randn(block.d)
    torch.testing.assert_close(found @ v, masked(problem, block, partition, of) @ v)


@given(seed=st.integers(0, 10_000), labels=st.lists(st.integers(0, 3), min_size=4, max_size=4))
@settings(max_examples=8, deadline=None)
def test_coarser_groups_are_never_worse(seed, labels):
    torch.manual_seed(seed)
    problem = four_layers()
    block = problem.group("all", [""])
    truth = exact.ggn(problem, block)

    def error(labels):
        parts = [
            [layer for layer, own in zip(LAYERS, labels, strict=True) if own == j]
            for j in sorted(set(labels))
        ]
        return metrics.relative_error(truth, approximations.groups(problem, block, parts)).value

    merged = [min(label, 1) for label in labels]
    assert error(merged) <= error(labels) + 1e-7  # the root of rounding in a difference of squares
    assert error(labels) <= error(range(4)) + 1e-7
    assert error([0] * 4) < 1e-7


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([["encoder"], ["encoder.0"]], r"must not overlap: \['encoder\.0'\]"),
        ([["encoder", "head"]], r"no layer 'head' in block all \(d = 26\); its layers"),
        ([["encode"]], r"no layer 'encode' in block"),
        (["encoder"], "each part must be a sequence of module names, not the string 'encoder'"),
        ([["encoder"], []], r"an empty part; give module names"),
    ],
)
def test_parts_that_are_none(parts, message):
    problem = four_layers()
    with pytest.raises(ValueError, match=message):
        approximations.groups(problem, problem.group("all", [""]), parts)


def convolution():
    layers = nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)
    targets = torch.tensor([0, 1, 2, 1])
    return Problem(nn.Sequential(*layers), nn.CrossEntropyLoss(), torch.randn(4, 1, 3, 3), targets)


def example_gradients(problem, targets):
    """[N, d]: gradients of the per-example losses for other targets, one example at a time."""
    rows = []
    for x, t in zip(problem.inputs.split(1), targets.split(1), strict=True):
        one = Problem(problem.model.requires_grad_(True), problem.loss, x, t)
        rows.append(one.gradient(one.group("all", [""])))
    return torch.stack(rows)


@pytest.mark.parametrize("make", [four_layers, convolution])
def test_the_three_diagonals(make):
    """The GGN's from the dense truth, the Fishers' from single gradients squared."""
    problem = make()
    block = problem.group("all", [""])

    def made(of):
        return approximations.diagonal(problem, block, of=of).diagonal

    ggn = dense(exact.ggn(problem, block)).diagonal()
    torch.testing.assert_close(made("ggn"), ggn)
    own = example_gradients(problem, problem.targets).square().mean(0)
    torch.testing.assert_close(made("empirical_fisher"), own)
    with torch.no_grad():
        p = problem.model(problem.inputs).softmax(1)
    by_label = [
        p[:, c, None] * example_gradients(problem, torch.full_like(problem.targets, c)).square()
        for c in range(p.shape[1])
    ]
    expected = torch.stack(by_label).sum(0).mean(0)
    torch.testing.assert_close(made("fisher"), expected)
    torch.testing.assert_close(expected, ggn)  # softmax: the Fisher is the GGN
    assert not torch.allclose(own, ggn)
    sampled = made("fisher_mc")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        drawn = likelihood_of(problem)[0].sample(problem.model(problem.inputs), generator)
    torch.testing.assert_close(sampled, example_gradients(problem, drawn).square().mean(0))
