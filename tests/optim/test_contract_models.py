"""Unusual models: unused, frozen, tied, normalised, stochastic layers, over all methods."""

import pytest
import torch
from torch import nn

from tests.optim.cases import (
    CLOSURE,
    MAKE,
    OF_PARAMETERS,
    ONE_EACH,
    RESCALED,
    autoencoder,
    batches,
    closure_of,
    each,
    make_for,
    owned,
    same,
    state_of,
    takes,
    train,
    train_on,
    weights,
)
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
one_each = pytest.mark.parametrize("kind", each(ONE_EACH))


def copies(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model, before):
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def in_blocks(opt, model):
    """The parameters that preconditioner() speaks of."""
    return {p for name in opt.preconditioner() for p in owned(model, name)}


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


@every
def test_frozen_shared_and_plain_parameters(kind):
    model = Tied()
    opt = MAKE[kind](model)
    before = copies(model)
    train(opt, model, batches(3))
    assert changed(model, before) == set(before) - {"still.weight", "fixed.bias"}
    shapes = {n: P.shape[0] for n, P in opt.preconditioner().items()}
    text = opt.summary()
    said = ["still.weight", "frozen", "total memory of the state"]
    if kind in OF_PARAMETERS:
        assert shapes == {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    else:
        assert shapes == {"first": 28, "middle": 16, "fixed": 16, "last": 30}
        said += [
            "shared as one.weight, two.weight",
            "plain rule: no block for Tied",
            "the weight beside it is frozen",
            "block 'first' [4, 7]",
        ]
    for words in said:
        assert words in text


class Choice(nn.Module):
    """Layers of one shape, of which forward uses those it is told to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.convolutions = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in range(3))
        self.use = [0, 1, 2]

    def forward(self, x):
        for i in self.use:
            x = self.convolutions[i](x.reshape(-1, 1, 2, 3)).flatten(1)
            x = self.layers[i](x.tanh())
        return x


@every
def test_layers_never_used(kind):
    model = Choice()
    model.use = [0, 2]
    opt, before = MAKE[kind](model, weight_decay=0.1), copies(model)
    train(opt, model, batches(5))
    unused = {name for name in before if ".1." in name}
    assert len(unused) == 4
    assert changed(model, before) == set(before) - unused
    assert not {p for n, p in model.named_parameters() if n in unused} & in_blocks(opt, model)
    assert not any(opt.state.get(p) for n, p in model.named_parameters() if n in unused)


@every
def test_layers_unused_in_some_steps_stand_still(kind):
    """Stacks hold layers of one shape together: those at rest keep weights and state."""
    torch.manual_seed(3)
    model, data = Choice(), batches(7)
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    opt = MAKE[kind](model, **{name: v for name, v in decay.items() if takes(kind, name)})
    uses = [[0, 1], [0, 1, 2], [2], [0, 2], [1, 2], [0], [0, 1, 2]]
    for x, use in zip(data, uses, strict=True):
        model.use = use
        before = copies(model)
        known = {p: {k: v.clone() for k, v in s.items()} for p, s in opt.state.items()}
        train(opt, model, [x])
        moving = {n for n in before if int(n.split(".")[1]) in use}
        assert changed(model, before) == moving
        # an inverse may be made again; EKFAC takes S along into its basis
        made = {"counts"}.union(*(stack.solved for stack in opt._harness.stacks))
        carried = made | ({"S"} if "U_A" in made else set())
        for name, parameter in model.named_parameters():
            if name not in moving and parameter in known:
                for key in known[parameter].keys() - carried:
                    assert torch.equal(known[parameter][key], opt.state[parameter][key]), key
        assert all(torch.isfinite(v).all() for s in state_of(opt) for v in s.values())


@every
def test_layers_held_together_are_trained_as_if_alone(kind):
    """A stack of same-shape layers does to each what a stack of one does."""
    results = []
    for together in (True, False):
        torch.manual_seed(3)
        model, data = Choice(), batches(5)
        opt = MAKE[kind](model)
        if not together:
            opt.param_groups[:] = [
                {**opt.param_groups[0], "params": [p]} for p in model.parameters()
            ]
            opt._harness.regroup()
        stacks = [len(stack.blocks) for stack in opt._harness.stacks]
        assert max(stacks) == (3 if together else 1)
        train(opt, model, data)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)  # products in another order


def test_bias_at_rest():
    """A bias of a frozen layer norm, an embedding: parameters without any block at all."""
    for kind in MAKE:
        model = nn.Sequential(nn.LayerNorm(6), nn.Flatten(), nn.PReLU())
        opt, before = MAKE[kind](model), copies(model)
        train(opt, model, batches(3))
        assert changed(model, before) == set(before)
        assert "PReLU" in opt.summary() or kind in OF_PARAMETERS


@pytest.mark.parametrize("kind", each(ONE_EACH - OF_PARAMETERS - RESCALED))
@pytest.mark.parametrize(("momentum", "decoupled"), [(0.0, False), (0.8, True)])
def test_plain_parameters_follow_the_rule_of_the_method(kind, momentum, decoupled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 6))
    settings = {"momentum": momentum, "decoupled_weight_decay": decoupled, "weight_decay": 0.1}
    opt = MAKE[kind](model, lr=0.05, **settings)
    keep, new = opt._harness.form(momentum)
    norm, M = model[1], 0
    for x in batches(4):
        old = norm.weight.detach().clone()
        train(opt, model, [x])
        M = keep * M + new * (norm.weight.grad + (0 if decoupled else 0.1) * old)
        expected = (1 - 0.05 * 0.1 * decoupled) * old - 0.05 * M
        torch.testing.assert_close(norm.weight.detach(), expected, rtol=1e-12, atol=1e-13)


@one_each
def test_batch_norm_sees_one_pass(kind):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6))

    model, twin, x = network(), network(), batches(1)[0]
    opt = MAKE[kind](model)
    opt.warm_up([closure_of(opt, model, x)])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    train(opt, model, [x])
    twin(x)
    assert len(list(model.buffers())) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))


@one_each
def test_dropout_and_random_state(kind):
    model, x = autoencoder(activation=lambda: nn.Dropout(0.5)), batches(1)[0]
    opt, seen = MAKE[kind](model), []
    model[1].register_forward_hook(lambda _m, _i, out: seen.append(out == 0))
    torch.manual_seed(5)
    train(opt, model, [x])
    after = torch.get_rng_state()
    assert len(seen) == (2 if kind in CLOSURE else 1)
    assert torch.equal(seen[0], seen[-1])
    torch.manual_seed(5)
    model(x)
    assert torch.equal(after, torch.get_rng_state())


@one_each
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_in_place_activation_changes_nothing(kind, name):
    results = []
    for inplace in (False, True):
        case = CASES[name]()
        for i, module in enumerate(case.model):
            if isinstance(module, nn.Tanh):
                case.model[i] = nn.LeakyReLU(0.2, inplace=inplace)
        opt = make_for(kind, case)
        train_on(opt, case, case.batches[:4])
        results.append((weights(case.model), state_of(opt)))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])
