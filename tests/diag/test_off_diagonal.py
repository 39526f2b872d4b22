"""Cross blocks and off-block mass against the dense matrix of the whole partition."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, dense, exact
from kronscope.diag.backward.products import dense_block
from kronscope.diag.off_diagonal import block_norms, cross, off_block_share
from kronscope.diag.problem.blocks import Block


@pytest.fixture
def mixed():
    """A convolution, a norm and two Linear layers: three routes to a block's columns."""
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2),
        nn.Tanh(),
        nn.Flatten(),
        nn.LayerNorm(12),
        nn.Linear(12, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(7, 1, 3, 3), torch.randint(3, (7,)))


@pytest.fixture
def narrow():
    """Two narrow layers of one width, before which a layer's own columns may be condensed."""
    sizes = (6, 5, 2, 6, 2, 5, 18)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*(m for layer in layers for m in (layer, nn.Tanh())), nn.LayerNorm(18))
    return Problem(model, nn.MSELoss(), torch.randn(7, 6), torch.randn(7, 18))


@pytest.mark.parametrize("of", ["hessian", "ggn", "fisher", "empirical_fisher"])
@pytest.mark.parametrize("name", ["mixed", "narrow"])
def test_cross_blocks_equal_parts_of_the_whole(name, of, request):
    mixed = request.getfixturevalue(name)
    blocks = mixed.blocks()
    for block in blocks:
        exact.truth(mixed, block, of)  # what a layer's own truth keeps is not for other layers
    group = mixed.group("all", [b.name for b in blocks])
    whole = dense_block(mixed, group, of, 1, None).detach()
    torch.testing.assert_close(dense(exact.truth(mixed, group, of)), whole)
    ends = torch.tensor([0, *(b.d for b in blocks)]).cumsum(0)
    norms = block_norms(mixed, blocks, of)
    scale = whole.abs().max().item()
    for j, first in enumerate(blocks):
        for k, second in enumerate(blocks):
            part = whole[ends[j] : ends[j + 1], ends[k] : ends[k + 1]]
            assert norms[j, k].item() == pytest.approx(part.norm().item(), rel=1e-9, abs=1e-12)
            found = cross(mixed, first, second, of)
            assert found.shape == (first.d, second.d)
            torch.testing.assert_close(
                found @ torch.eye(second.d), part, rtol=0, atol=1e-12 * scale
            )
    diagonal = sum(norms[j, j] ** 2 for j in range(len(blocks)))
    expected = (1 - diagonal / whole.square().sum()).sqrt().item()
    assert 0 < off_block_share(norms) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("of", ["hessian", "ggn", "empirical_fisher"])
def test_units_of_one_layer_name_the_same_parameters(mixed, of):
    units = [mixed.block(name) for name in ("4[0]", "4[1]", "4[4]", "0[1,0]", "0[1,bias]", "6[2]")]
    layers = {name: dense_block(mixed, mixed.block(name), of, 1, None) for name in "046"}
    norms = block_norms(mixed, units, of)
    for j, first in enumerate(units):
        for k, second in enumerate(units):
            if k < j and of != "hessian":
                continue  # the transpose of one before
            found = cross(mixed, first, second, of) @ torch.eye(second.d)
            both = Block("both", (*first.members, *second.members))
            whole = dense_block(mixed, both, of, 1, None)
            torch.testing.assert_close(found, whole[: first.d, first.d :])
            assert norms[j, k].item() == pytest.approx(found.norm().item(), rel=1e-9, abs=1e-12)
    # by the layer's own matrix: rows 0 and 1 of the [W, b] of a Linear layer with 12 inputs
    expected = layers["4"][:13, 13:26]
    torch.testing.assert_close(cross(mixed, units[0], units[1], of) @ torch.eye(13), expected)
    assert expected.norm() > 1e-4


def test_blocks_that_overlap(mixed):
    """A layer and one of its neurons: the rows of the neuron in the layer's own block."""
    layer, unit = mixed.block("4"), mixed.block("4[1]")
    expected = dense_block(mixed, layer, "hessian", 1, None)[13:26]
    torch.testing.assert_close(cross(mixed, unit, layer, "hessian") @ torch.eye(layer.d), expected)


def test_one_block_has_nothing_outside(mixed):
    assert off_block_share(block_norms(mixed, [mixed.block("4")])) == pytest.approx(0, abs=1e-7)


def test_refusals(mixed):
    with pytest.raises(ValueError, match="no truth 'gng'"):
        block_norms(mixed, mixed.blocks(), "gng")
    mixed.budget = 1000
    with pytest.raises(ValueError, match="give fewer examples"):
        block_norms(mixed, mixed.blocks())
