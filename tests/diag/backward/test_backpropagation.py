"""Sweeps of large networks on tiny ones: narrow layers, chunks, layers that do not qualify."""

from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.functional import linear

from kronscope.diag import Problem, dense, exact
from kronscope.diag.backward.backpropagation import backpropagate
from kronscope.diag.backward.layers import layers
from kronscope.diag.backward.loss_roots import loss_roots

N = 5
TRUTHS = ("ggn", "empirical_fisher", "hessian")


def half_squares(z, t):
    return (z - t).square().sum() / 2 / len(z)


def problem_of(model, inputs):
    return Problem(model, half_squares, inputs, torch.randn_like(model(inputs)))


def by_definition(problem, block):
    """{truth: [d, d]} under half squares, whose Hessian at the outputs is the identity."""

    def outputs(v):
        moved = {n: problem.model.get_parameter(n) + s for n, s in block.split(v).items()}
        return functional_call(problem.model, moved, (problem.inputs,))

    at = torch.zeros(block.d)
    J = jacobian(outputs, at).reshape(problem.n, -1, block.d)
    g = torch.einsum("ncd,nc->nd", J, (outputs(at) - problem.targets).flatten(1))
    return {
        "ggn": torch.einsum("ncd,nce->de", J, J) / problem.n,
        "empirical_fisher": g.T @ g / problem.n,
        "hessian": hessian(lambda v: problem.loss(outputs(v), problem.targets), at),
    }


def check_truths(problem):
    assert problem.blocks()
    for block in problem.blocks():
        for of, expected in by_definition(problem, block).items():
            found = dense(exact.truth(problem, block, of))
            slack = 1e-11 * expected.abs().max().item() + 1e-14  # float64, sums of few
            torch.testing.assert_close(found, expected, rtol=0, atol=slack)


class Skip(nn.Module):
    """A narrow code with a connection around it."""

    def __init__(self):
        super().__init__()
        self.first, self.code = nn.Linear(4, 6), nn.Linear(6, 1)
        self.around, self.out = nn.Linear(6, 3), nn.Linear(4, 12)

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.out(torch.tanh(torch.cat([self.code(h), self.around(h)], 1)))


def roots_at(problem, name):
    """How many roots the sweep brings to a layer."""
    (chunk,) = backpropagate(problem, [name], loss_roots(problem, "ggn"))
    return len(chunk.layers[name].b[0])


CODES = {  # sizes, and how many roots reach each layer of 12 outputs
    # code "6" of 2 comes first; code "2" of 4 then has nothing to condense
    (5, 6, 4, 5, 2, 5, 12): {"0": 2, "2": 2, "4": 2, "6": 12, "8": 12, "10": 12},
    # the nearest narrow layer is reached from a wider one nearer to the outputs
    (3, 5, 2, 5, 4, 12): {"0": 2, "2": 4, "4": 4, "6": 12, "8": 12},
}


@pytest.mark.parametrize("sizes", CODES)
def test_roots_are_condensed_at_every_narrow_layer(network, monkeypatch, sizes):
    monkeypatch.setattr("kronscope.diag.backward.backpropagation.NARROW", 3)
    problem = problem_of(network(list(sizes), nn.Tanh), torch.randn(N, sizes[0]))
    assert {name: roots_at(problem, name) for name in CODES[sizes]} == CODES[sizes]
    check_truths(problem)
    for block, truth in exact.truths(problem, problem.blocks(), "ggn"):  # one sweep for all
        torch.testing.assert_close(dense(truth), by_definition(problem, block)["ggn"])


def test_a_skip_connection_forbids_condensing(monkeypatch):
    monkeypatch.setattr("kronscope.diag.backward.backpropagation.NARROW", 3)
    problem = problem_of(Skip(), torch.randn(N, 4))
    assert roots_at(problem, "first") == roots_at(problem, "code") == 12
    check_truths(problem)


def mixed():
    """Shared weights, an in-place ReLU, a norm, rows: every way a truth is put together."""
    return nn.Sequential(
        nn.Conv1d(2, 3, 2),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.LayerNorm(6),
        nn.Linear(6, 4),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


@pytest.mark.parametrize("few", [16, 0])
@pytest.mark.parametrize("at_once", [2**22, 1])
def test_chunks_of_one_example_and_roots_all_at_once(monkeypatch, at_once, few):
    monkeypatch.setattr("kronscope.diag.backward.backpropagation.AT_ONCE", at_once)
    monkeypatch.setattr("kronscope.diag.backward.backpropagation.FEW", few)
    problem = problem_of(mixed(), torch.randn(N, 2, 3))
    chunks = backpropagate(problem, ["0", "4"], loss_roots(problem, "ggn"))
    assert len(list(chunks)) == (1 if at_once > 1 else N)
    check_truths(problem)


class ByHand(nn.Module):
    """The layer's weight is used once more, outside the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(linear(torch.tanh(self.layer(x)), self.layer.weight)))


class TimeFirst(nn.Module):
    """[N, T, in] turned to [T, N, in] before the layer."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(2, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x.transpose(0, 1)))[-1])


class Reversed(nn.Module):
    """The layer sees the examples in reverse order."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.out(torch.tanh(self.layer(x.flip(0))).flip(0))


class Scaled(nn.Linear):
    """A Linear layer in name only."""

    def forward(self, x):
        return 2 * super().forward(x)


def subclassed():
    return nn.Sequential(OrderedDict(layer=Scaled(3, 3), tanh=nn.Tanh(), out=nn.Linear(3, 2)))


class Shared(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.layer, self.twin, self.out = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        self.twin.weight = self.layer.weight

    def forward(self, x):
        return self.out(torch.tanh(self.twin(torch.tanh(self.layer(x)))))


@pytest.mark.parametrize(
    ("model", "shape"),
    [(ByHand, (3,)), (Reversed, (3,)), (subclassed, (3,)), (Shared, (3,))]
    + [(TimeFirst, (steps, 2)) for steps in (1, 3, N)],
)
def test_layers_that_do_not_qualify_have_right_truths(model, shape):
    problem = problem_of(model(), torch.randn(N, *shape))
    assert list(layers(problem)) == ["out"]
    check_truths(problem)


class NoLayer(nn.Module):
    """A parameter by hand; its only Linear layer is frozen in the pass."""

    def __init__(self):
        super().__init__()
        self.scale, self.fixed = nn.Parameter(torch.randn(3)), nn.Linear(3, 3)

    def forward(self, x):
        with torch.no_grad():
            h = self.fixed(x)
        return self.scale * h


@pytest.mark.parametrize(
    ("model", "shape"), [(NoLayer, (3,)), (lambda: nn.LayerNorm(3), (3,)), (nn.PReLU, (2,))]
)
def test_models_without_a_layer_that_qualifies(model, shape):
    problem = problem_of(model(), torch.randn(N, *shape))
    assert layers(problem) == {}
    check_truths(problem)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("slopes", [1, 4])
def test_a_module_that_vmap_gets_wrong(outputs, slopes):
    """One root of nn.PReLU's weight by vmap is wrong in torch 2.13, with no error."""
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(slopes), nn.Linear(4, outputs))
    check_truths(problem_of(model, torch.randn(N, 3)))


@pytest.mark.parametrize("model", [mixed, NoLayer])
def test_a_caller_who_switched_gradients_off(model):
    inputs = torch.randn(N, 2, 3) if model is mixed else torch.randn(N, 3)
    problem = problem_of(model(), inputs)
    expected = [by_definition(problem, block) for block in problem.blocks()]
    with torch.no_grad():
        assert list(layers(problem)) == (["0", "4", "6"] if model is mixed else [])
        for block, own in zip(problem.blocks(), expected, strict=True):
            for of in TRUTHS:
                torch.testing.assert_close(dense(exact.truth(problem, block, of)), own[of])


def state_of(model):
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    return hooks, flags, model.training, {n: t.clone() for n, t in model.state_dict().items()}


def test_the_models_are_left_as_they_were():
    model = mixed().train()
    problem = problem_of(model, torch.randn(N, 2, 3))
    before = state_of(model), state_of(problem.model)
    for of in TRUTHS:
        for _ in exact.truths(problem, problem.blocks(), of):
            pass
    with pytest.raises(ValueError, match="no truth 'gng'"):
        exact.truth(problem, problem.block("6"), "gng")
    for old, new in zip(before, (state_of(model), state_of(problem.model)), strict=True):
        assert old[:3] == new[:3]
        assert all(torch.equal(old[3][name], new[3][name]) for name in old[3])
    assert not any(state_of(problem.model)[0])
