"""Unusual models under HessianFree."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.optim.cases import autoencoder, batches, closure_of, loss_of, weights
from tests.optim.methods.hessian_free.cases import (
    Between,
    both,
    dense_ggn,
    every,
    make,
    places,
)
from tests.optim.models import CASES


def train(opt, model, data):
    return [opt.step(closure_of(opt, model, x)).item() for x in data]


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


class Tied(nn.Module):
    """Plain parameters, a frozen weight, a frozen bias, a weight used twice."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(6, 4), nn.Linear(4, 4, bias=False)
        self.scale = nn.Parameter(torch.ones(4))
        self.still, self.fixed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        self.two.weight = self.one.weight
        self.last = nn.Linear(4, 6)
        self.still.weight.requires_grad_(False)
        self.fixed.bias.requires_grad_(False)

    def forward(self, x):
        x = self.fixed(self.still(self.middle(self.first(x)).tanh() * self.scale))
        return self.last(self.two(self.one(x).tanh()))


@both
def test_frozen_tied_and_plain_parameters_against_the_dense_solution(blocks):
    model, x = Tied(), batches(1)[0]
    opt = make(model, blocks, curvature_batch=16, max_cg=400, lr=1.0)
    moving = {name for name, p in model.named_parameters() if p.requires_grad}
    case = CASES["mlp"]()._replace(model=model)
    G, before, old = dense_ggn(case, x), copies(model), weights(model)
    train(opt, model, [x])
    assert changed(model, before) == moving
    g = torch.cat(
        [torch.zeros(p.numel()) if p.grad is None else p.grad.view(-1) for p in model.parameters()]
    )
    for part in opt.parts:
        at = places(model, part)
        A = G[at][:, at] + 0.3 * torch.eye(len(at))
        expected = old[at] - torch.linalg.solve(A, g[at])
        torch.testing.assert_close(weights(model)[at], expected, rtol=0, atol=1e-8)
    names = ["", "first", "middle", "still", "fixed", "one", "two", "last"]
    assert [part.name for part in opt.parts] == (["model"] if blocks is None else names)
    assert next(row for row in opt.summary().splitlines() if "still.weight" in row).endswith("B")
    assert "frozen" in opt.summary()


class Choice(nn.Module):
    """Layers of which forward uses those it is told to."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.use = [0, 1, 2]

    def forward(self, x):
        for i in self.use:
            x = self.layers[i](x.tanh())
        return x


@both
@pytest.mark.parametrize("to_none", [True, False])
def test_layers_unused_in_some_steps_stand_still(blocks, to_none):
    model, data = Choice(), batches(6)
    opt = make(model, blocks)
    for x, use in zip(data, [[0], [0, 1], [0, 1], [1], [0], [0, 1]], strict=True):
        model.use = use
        before, held = copies(model), {p: copy.deepcopy(s) for p, s in opt.state.items()}

        def closure(x=x):
            for p in model.parameters():
                p.grad = None if to_none or p.grad is None else torch.zeros_like(p)
            loss = loss_of(model, x)
            loss.backward()
            return loss

        opt.step(closure)
        moving = {name for name in before if int(name.split(".")[1]) in use}
        if to_none:
            assert changed(model, before) == moving
            for name, p in model.named_parameters():
                if name not in moving and p in held:
                    assert torch.equal(held[p]["solution"], opt.state[p]["solution"])
        assert torch.isfinite(weights(model)).all()
    assert not any(opt.state.get(p) for p in model.layers[2].parameters())


@both
@pytest.mark.parametrize("inplace", [nn.ReLU, nn.LeakyReLU])
def test_in_place_activations_change_nothing(blocks, inplace):
    ends = []
    for where in (False, True):
        model = autoencoder(activation=lambda where=where: inplace(inplace=where))
        train(make(model, blocks), model, batches(4))
        ends.append(weights(model))
    assert torch.equal(*ends)


@both
def test_recomputed_activations_change_nothing(blocks):
    ends = []
    for again in (False, True):
        model = autoencoder()
        if again:
            inner, forward = model[2], model[2].forward
            inner.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
        train(make(model, blocks), model, batches(4))
        ends.append(weights(model))
    assert torch.equal(*ends)


class Nested(nn.Module):
    """Takes inputs at any depth, and what is no input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.one, self.two = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, pair, *, more, scale, name):
        assert name == "sum"
        x, (y, table) = pair
        assert len(x) == len(y) == len(more["z"][0])
        assert table.shape == (3,)
        return (self.one(x).tanh() + self.two(y * table).tanh() + more["z"][0]) * scale


@every
def test_nested_arguments_are_cut(method, blocks):
    """Against a model of one tensor, that takes itself apart."""
    ends = []
    for nested in (True, False):
        torch.manual_seed(7)
        model, data = Nested(), torch.randn(3, 8, 13)
        table = torch.tensor([1.0, 2.0, 3.0])

        class Whole(nn.Module):
            def __init__(self, inner):
                super().__init__()
                self.inner = inner

            def forward(self, x, table=table):
                x, y, z = x.split([6, 3, 4], 1)
                more = {"z": [z]}
                return self.inner((x, (y, table)), more=more, scale=2.0, name="sum")

        outer = Whole(model)
        opt = make(model if nested else outer, blocks, "gaussian", method=method)
        for x in data:

            def closure(x=x, outer=outer, opt=opt):
                opt.zero_grad()
                loss = 0.5 * (outer(x) - 1).square().sum() / len(x)
                loss.backward()
                return loss

            opt.step(closure)
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)  # products in another order


def test_outputs_that_are_no_batch():
    x = batches(1)[0]
    model = nn.Sequential(nn.Linear(6, 2), nn.Flatten(0))
    opt = make(model)
    with pytest.raises(ValueError, match=r"5 of its examples returned shape \(32,\)"):
        opt.step(closure_of(opt, model, x, lambda model, x: model(x).square().sum()))
    for wrap in (lambda y: (y, y), lambda y: y.sum()):
        model = Between(torch.tanh)
        model.register_forward_hook(lambda _m, _i, y, wrap=wrap: wrap(y))
        opt = make(model)
        with pytest.raises(ValueError, match="must return one tensor whose dimension 0 is the bat"):
            opt.step(lambda model=model: model(x)[0])
