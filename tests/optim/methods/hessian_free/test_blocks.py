"""Which parameters HessianFree solves for together, what it says of them, what it refuses."""

import pytest
import torch
from torch import nn

from kronscope import optim
from kronscope.optim.blocks.partitions import partition
from tests.optim.cases import weights
from tests.optim.methods.hessian_free.cases import (
    make,
    make_for,
    step,
)
from tests.optim.models import CASES


class Net(nn.Module):
    """Modules within modules, a parameter of the model's own, one frozen layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        self.encoder = nn.ModuleDict({"deep": inner, "wide": nn.Linear(6, 4)})
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(4))
        self.decoder = nn.Linear(4, 6)

    def forward(self, x):
        h = self.encoder["deep"](x) + self.encoder["wide"](x)
        return self.decoder(self.still(h).tanh() * self.scale)


ALONE = ["", "encoder.deep.0", "encoder.deep.2", "encoder.wide", "decoder"]
PARTS = {
    "none": (None, ["model"]),
    "each": ([], ALONE),
    "the model itself": ([[""]], ["model"]),
    "a module with all inside": (
        [["encoder"]],
        ["encoder", "", "decoder"],
    ),
    "some": (
        [["decoder", "encoder.deep.2"], ["encoder.wide"]],
        ["decoder+encoder.deep.2", "encoder.wide", "", "encoder.deep.0"],
    ),
    "a function": (
        lambda model: [[name] for name, _ in model.named_children() if name != "still"],
        ["encoder", "decoder", ""],
    ),
    "tuples": (
        (("encoder.deep",), ("encoder.wide", "decoder")),
        ["encoder.deep", "encoder.wide+decoder", ""],
    ),
}


@pytest.mark.parametrize(("blocks", "names"), PARTS.values(), ids=PARTS)
def test_parts(blocks, names):
    model = Net()
    opt = make(model, blocks)
    assert [part.name for part in opt.parts] == names
    order = {p: i for i, p in enumerate(model.parameters())}
    every = []
    for part in opt.parts:
        places = [order[p] for p in part.parameters]
        assert places == sorted(places)  # the model's order
        every += part.parameters
    assert len(every) == len(set(every))
    assert set(every) == {p for p in model.parameters() if p.requires_grad}


def test_nested_modules_are_all_that_is_inside():
    model = Net()
    parts = partition(model, model.parameters(), [["encoder.deep", "still"]])
    inside = {*model.encoder["deep"].parameters(), *model.still.parameters()}
    assert set(parts[0].parameters) == inside
    assert [part.name for part in parts[1:]] == ["", "encoder.wide", "decoder"]
    parts = partition(model, [model.scale, *model.decoder.parameters()], None)
    assert [part.parameters for part in parts] == [[model.scale, *model.decoder.parameters()]]


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([["coder"]], r"no modules \['coder'\] in Net; known: \['encoder', 'encoder.deep', "),
        (["decoder"], "each block is a sequence of module names, not the string 'decoder'"),
        ("decoder", "each block is a sequence of module names, not the string 'd'"),
        ([["decoder"], []], "an empty block; give module names, or leave it out"),
        (
            [["encoder"], ["encoder.deep.0", "decoder"]],
            r"block \['encoder.deep.0', 'decoder'\] overlaps \['encoder'\]: each parameter",
        ),
        ([["decoder"], [""]], r"block \[''\] overlaps \['decoder'\]"),
        ([["still"]], r"block \['still'\] holds no parameter that this optimizer trains"),
        ([["encoder.deep.1"]], r"block \['encoder.deep.1'\] holds no parameter"),
        (lambda _: [["nowhere"]], r"no modules \['nowhere'\]"),
    ],
)
def test_blocks_that_cannot_be(blocks, said):
    with pytest.raises(ValueError, match=said):
        make(Net(), blocks)


def test_tied_weights_belong_to_one_block():
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    assert [len(part.parameters) for part in make(model, []).parts] == [2, 1]
    with pytest.raises(ValueError, match=r"block \['2'\] overlaps \['0'\]"):
        make(model, [["0"], ["2"]])


@pytest.mark.parametrize("blocks", [None, [], [["0", "4"]]], ids=str)
def test_summary_and_directions(blocks):
    case = CASES["mlp"]()
    opt = make_for(case, blocks)
    with pytest.raises(RuntimeError, match="no direction yet: take a step first"):
        opt.directions()
    assert opt.summary().endswith("curvature products: chosen at the first step")
    for batch in case.batches[:3]:
        step(opt, case, batch)
    before = weights(case.model)
    step(opt, case, case.batches[3])
    head, titles, *rows, total, route = opt.summary().splitlines()
    assert head == f"HessianFree after 4 steps, {len(opt.parts)} blocks"
    assert titles.split() == ["parameter", "shape", "treatment", "memory", "counters"]
    assert route == "curvature products by double backward"
    named, size = dict(case.model.named_parameters()), 0
    first = {part.parameters[0]: part for part in opt.parts}
    for (name, p), row in zip(named.items(), rows, strict=True):
        part = next(part for part in opt.parts if any(p is q for q in part.parameters))
        own = sum(v.numel() * v.element_size() for v in opt.state[p].values())
        size += own
        assert row.split()[0] == name
        assert f"block {part.name}  " in row
        assert f"  {own} B" in row
        assert ("steps 4, iterations 20" in row) == (p in first)
    assert total == f"total memory of the state: {size} B"
    found = opt.directions()
    assert list(found) == [part.name for part in opt.parts]
    assert {n for own in found.values() for n in own} == set(named)
    flat = {n: d for own in found.values() for n, d in own.items()}
    d = torch.cat([flat[name].view(-1) for name in named])
    torch.testing.assert_close(weights(case.model), before + 0.5 * d)
    assert all(flat[n] is opt.state[p]["solution"] for n, p in named.items())  # live


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("lr", -1, "lr must be zero or positive, got -1"),
        ("damping", 0, "damping must be a positive number, got 0"),
        ("momentum", 1.0, r"momentum must lie in \[0, 1\), got 1.0"),
        ("weight_decay", -0.1, "weight_decay must be zero or positive"),
        ("likelihood", "empirical", r"no likelihood 'empirical'; known: .*gaussian"),
        ("curvature_batch", 0, "curvature_batch must be an integer of at least 1, got 0"),
        ("max_cg", 2.0, "max_cg must be an integer of at least 1, got 2.0"),
    ],
)
def test_bad_settings(name, value, said):
    with pytest.raises(ValueError, match=said):
        optim.HessianFree(nn.Linear(2, 2), **{name: value})
