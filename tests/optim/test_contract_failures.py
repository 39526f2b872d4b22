"""Numbers that are not finite never enter a state; failures are counted, then named."""

import copy

import pytest
import torch
from torch import nn

from kronscope.optim.core import refresher as refresh
from tests.optim.cases import (
    CLOSURE,
    MAKE,
    OF_PARAMETERS,
    ONE_EACH,
    RECIPES,
    closure_of,
    count,
    dense,
    each,
    make_for,
    owned,
    state_of,
    takes,
    train_on,
    weights,
)
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
one_each = pytest.mark.parametrize("kind", each(ONE_EACH))
refreshing = pytest.mark.parametrize("kind", each(k for k in MAKE if takes(k, "refresh_every")))
BAD = {"nan": float("nan"), "inf": float("inf")}


def finite(opt):
    return all(torch.isfinite(v).all() for state in state_of(opt) for v in state.values())


def first_blocks(opt, model):
    """The first parameter of every block."""
    return [owned(model, name)[0] for name in opt.preconditioner()]


@every
@pytest.mark.parametrize(
    ("name", "value", "start"),
    [("mlp", "nan", 0), ("cnn", "nan", 2), ("cnn", "inf", 0), ("shared", "inf", 2)],
)
def test_a_bad_input_changes_nothing_but_the_counters(kind, name, value, start):
    case = CASES[name]()
    opt = make_for(kind, case, refresh_every=2, weight_decay=0.01)
    train_on(opt, case, case.batches[:start])
    before = {p: p.detach().clone() for p in case.model.parameters()}
    x, t = case.batches[start]
    spoiled = x.clone()
    spoiled.view(len(x), -1)[3, 1] = BAD[value]
    bad = (spoiled, spoiled) if t is x else (spoiled, t)
    opt.step(closure_of(opt, case.model, bad, case.loss))
    reached = case.model.parameters() if value == "nan" else [next(case.model.parameters())]
    for parameter in reached:  # an infinite activation saturates: later layers see nothing of it
        assert torch.equal(parameter, before[parameter])
        if parameter in set(first_blocks(opt, case.model)):
            assert count(opt, parameter, "not finite") > 0
    assert finite(opt)
    assert "not finite" in opt.summary()
    losses = train_on(opt, case, case.batches[start + 1 : start + 4])
    assert torch.isfinite(torch.tensor(losses)).all()
    assert finite(opt)
    assert not any(torch.equal(p, old) for p, old in before.items())


@every
@pytest.mark.parametrize("value", sorted(BAD))
def test_one_bad_gradient_stops_its_block_alone(kind, value):
    case = CASES["cnn"]()
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:2])
    before = copy.deepcopy(case.model)

    def closure():
        loss = closure_of(opt, case.model, case.batches[2], case.loss)()
        if case.model[2].weight.grad is not None:  # K-BFGS's second pass makes none
            case.model[2].weight.grad[1, 0, 0, 0] = BAD[value]
        return loss

    opt.step(closure)
    assert torch.equal(before[2].weight, case.model[2].weight)
    for i in (0, 4, 6):
        assert not torch.equal(before[i].weight, case.model[i].weight)
    assert finite(opt)
    assert count(opt, case.model[2].weight, "not finite") in (1, 2, 3)  # two groups, EKFAC-ra's S
    assert count(opt, case.model[0].weight, "not finite") == 0
    train_on(opt, case, case.batches[3:5])
    assert finite(opt)


@every
def test_an_overflow_of_statistics_alone(kind):
    """Inputs so large that only their squares overflow: gradients of saturated units are zero."""
    case = CASES["mlp"]()
    case.model[0].weight.data[0].zero_()  # one unit stays alive
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:2])
    x, _ = case.batches[2]
    huge = torch.where(x > 0.5, 1e200, -1e200)
    losses = [train_on(opt, case, [(huge, x)])[0], *train_on(opt, case, case.batches[3:6])]
    assert finite(opt)
    assert torch.isfinite(torch.tensor(losses)).all()
    assert torch.isfinite(weights(case.model)).all()


@pytest.mark.parametrize("kind", each(CLOSURE))
@pytest.mark.parametrize("value", sorted(BAD))
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_bad_second_pass_spoils_no_pair(kind, value, where):
    case = CASES["cnn"]()
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:3])
    before, calls = dense(opt), []
    forward = case.model[5].forward

    def spoiled(x):
        calls.append(1)
        y = forward(x)
        if len(calls) == 2 and where == "forward":
            return y * BAD[value]
        if len(calls) == 2:
            y.register_hook(lambda g: g * BAD[value])
        return y

    case.model[5].forward = spoiled
    train_on(opt, case, case.batches[3:4])
    assert len(calls) == 2
    assert finite(opt)
    # the first pass was good, so H_a has learned from it; H_g has not
    for i in (0, 2, 4):
        assert count(opt, case.model[i].weight, "not finite") == case.model[i].groups
    left = opt.preconditioner()["0"].left @ torch.eye(4)
    old = before["0"].reshape(4, 19, 4, 19)
    new = dense(opt)["0"].reshape(4, 19, 4, 19)
    assert torch.linalg.eigvalsh(left)[0] > 0
    ratio = torch.einsum("iaja->ij", new) / torch.einsum("iaja->ij", old)
    torch.testing.assert_close(ratio, ratio[0, 0].expand(4, 4))  # H_g ⊗ tr H_a: the same H_g
    train_on(opt, case, case.batches[4:6])
    assert finite(opt)


def factors(opt, parameter):
    """Names of what is inverted or rooted for this parameter."""
    names = [k.removesuffix("_failures") for k in opt.state[parameter] if k.endswith("_failures")]
    assert names
    return names


class Later:
    """The event of a copy to the host that takes one step more."""

    def __init__(self):
        self.asked = 0

    def query(self):
        self.asked += 1
        return self.asked > 1

    def synchronize(self):
        self.asked = 2


def as_on_a_gpu(monkeypatch):
    """The Refresher's flags arrive a step later."""
    monkeypatch.setattr(refresh, "free_to_read", lambda _: False)
    monkeypatch.setattr(refresh, "to_host", lambda flags: (flags.clone(), Later()))


@refreshing
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_factor_that_cannot_be_inverted(kind, late, name, monkeypatch):
    if late:
        as_on_a_gpu(monkeypatch)
    case = CASES[name]()
    opt = make_for(kind, case, refresh_every=1, update_every=50)
    train_on(opt, case, case.batches[:3])
    layer = case.model[2].weight
    factor, good, P = factors(opt, layer)[-1], copy.deepcopy(opt.state[layer]), dense(opt)
    opt.state[layer][factor].fill_(float("nan"))
    train_on(opt, case, case.batches[3:5] if not late else case.batches[3:6])
    assert count(opt, layer, "failed inverses") >= 2
    for key, value in opt.state[layer].items():
        if key not in (factor, "momentum", "counts") and not key.endswith("_failures"):
            assert torch.equal(value, good[key]), key
    block = next(n for n in P if owned(case.model, n)[0] is layer)
    assert torch.equal(dense(opt)[block], P[block])
    assert torch.isfinite(weights(case.model)).all()
    assert count(opt, case.model[0].weight, "failed inverses") == 0
    with pytest.raises(RuntimeError, match=rf"'{block}'.*3 times in a row; raise the damping"):
        train_on(opt, case, case.batches[6:8])


@refreshing
def test_recovery_forgets_failures(kind):
    case = CASES["mlp"]()
    opt = make_for(kind, case, refresh_every=1, update_every=50)
    train_on(opt, case, case.batches[:2])
    layer = case.model[2].weight
    factor = factors(opt, layer)[0]
    held = opt.state[layer][factor].clone()
    for _ in range(2):
        opt.state[layer][factor].fill_(float("nan"))
        train_on(opt, case, case.batches[2:4])
        opt.state[layer][factor].copy_(held)
        train_on(opt, case, case.batches[4:5])
        assert int(opt.state[layer][f"{factor}_failures"].max()) == 0
    assert count(opt, layer, "failed inverses") >= 4  # both of KFAC's with its common π


@pytest.mark.parametrize("late", [False, True])
def test_float64_solves_what_float32_cannot(late, monkeypatch):
    if late:
        as_on_a_gpu(monkeypatch)
    model, x = nn.Linear(6, 4).float(), torch.randn(8, 6).float()
    settings = {"likelihood": "gaussian", "refresh_every": 1, "update_every": 50}
    opt = MAKE["kfac"](model, damping=1e-8, lr=0.0, **settings)
    step = closure_of(opt, model, x, lambda model, x: model(x).square().sum(1).mean())
    opt.step(step)
    # rank one and 1e10 times the damping on each factor: lost in 24 bits, not in 53
    opt.state[model.weight]["A"].fill_(1e6)
    for _ in range(1 + late):
        opt.step(step)
    assert count(opt, model.weight, "failed inverses") == 0
    exact = torch.linalg.inv(torch.full((7, 7), 1e6) + 1e-4 * torch.eye(7))
    own = opt.state[model.weight]["A_inv"].double()
    # condition 7e10 times float64's rounding
    torch.testing.assert_close(own, exact, rtol=1e-4, atol=1.0)


HEAVY = [k for k in sorted(MAKE) if RECIPES[k].method in ("MBF", "Shampoo", "TNT", "Eva")]


@pytest.mark.parametrize("kind", each(HEAVY))
def test_a_heavy_ball_that_overflows_begins_anew(kind):
    """Gradients of which each is finite, but not their sum."""
    case = CASES["mlp"]()
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:2])
    largest = torch.finfo(torch.float64).max / 1.5
    for state in opt.state.values():
        state["momentum"].view(-1)[0] = largest
    before = [p.detach().clone() for p in case.model.parameters()]

    def closure():
        loss = closure_of(opt, case.model, case.batches[2], case.loss)()
        for p in case.model.parameters():
            p.grad.view(-1)[0] = largest
        return loss

    with opt.frozen():
        opt.step(closure)
    assert finite(opt)
    for p, old in zip(case.model.parameters(), before, strict=True):
        assert torch.equal(p, old)
    losses = train_on(opt, case, case.batches[3:6])
    assert torch.isfinite(torch.tensor(losses)).all()
    assert not any(torch.equal(p, q) for p, q in zip(case.model.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", each(MAKE))
def test_a_plain_parameter_whose_momentum_overflows(kind):
    if kind in OF_PARAMETERS:
        pytest.skip("every parameter has a block")
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    x = torch.rand(6, 3)
    opt = MAKE[kind](model)

    def closure():
        opt.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / 6
        loss.backward()
        return loss

    opt.step(closure)
    norm, before = model[1].weight, model[1].weight.detach().clone()
    opt.state[norm]["momentum"].fill_(torch.finfo(torch.float64).max)
    for group in opt.param_groups:
        group["momentum"] = 1.5  # no momentum that is allowed overflows by itself

    with opt.frozen():
        opt.step(closure)
    assert torch.equal(norm, before)
    assert torch.isfinite(opt.state[norm]["momentum"]).all()
    assert "not finite 1" in opt.summary()


@pytest.mark.parametrize("kind", refreshing.args[1])
def test_early_steps_solve_only_what_has_changed(kind, monkeypatch):
    case = CASES["mlp"]()
    opt = make_for(kind, case, update_every=3, refresh_every=100)
    solved, original = [], refresh.Refresher.solve

    def spy(self, jobs):
        jobs = list(jobs)
        solved.append(len(jobs))
        original(self, jobs)

    monkeypatch.setattr(refresh.Refresher, "solve", spy)
    train_on(opt, case, case.batches[:6])
    early = RECIPES[kind].method not in ("MBF", "Shampoo", "ExactFisher")  # these wait a period
    usual = [True, False, False, early, False, False]
    # KFAC2015's damping is a tensor, which is not looked at
    assert [n > 0 for n in solved] == ([True] * 6 if kind == "kfac-2015" else usual)
    train_on(opt, case, case.batches[6:7])
    for group in opt.param_groups:
        group["damping"] *= 2
    train_on(opt, case, case.batches[7:8])
    # EKFAC adds the damping in the step itself
    assert (solved[7] > 0) == (early and RECIPES[kind].method not in ("EKFAC", "EKFACra"))
