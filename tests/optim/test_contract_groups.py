"""Parameter groups and schedulers, over all methods."""

import copy

import pytest
import torch

from kronscope.optim import Damping
from tests.optim.cases import (
    CLOSURE,
    MAKE,
    ONE_RATE,
    dense,
    each,
    make_for,
    owned,
    same,
    state_of,
    takes,
    train_on,
    unclipped,
    vector,
    weights,
)
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
each_its_rate = pytest.mark.parametrize("kind", each(set(MAKE) - ONE_RATE))


def setting(opt, name):
    """parameter -> its group's setting, as a tensor of the parameter's shape."""
    groups = {p: group for group in opt.param_groups for p in group["params"]}
    return lambda p: torch.full_like(p, groups[p][name])


def three_groups(model, *, decoupled):
    """First layer's weight, all biases, and the rest."""
    biases = [p for p in model.parameters() if p.ndim == 1]
    own = {"weight_decay": 0.3, "decoupled_weight_decay": decoupled}
    return [
        {"params": [next(model.parameters())], "lr": 0.002, **own},
        {"params": biases, "lr": 0.004, "weight_decay": 0.0, "decoupled_weight_decay": decoupled},
    ]


def expected(opt, model, P, name, old):
    """W_bar after one step without momentum, from P, groups and .grad."""
    tau, lr = (vector(model, name, setting(opt, key)) for key in ("weight_decay", "lr"))
    decoupled = vector(model, name, setting(opt, "decoupled_weight_decay"))
    gradient = vector(model, name, lambda p: p.grad) + (1 - decoupled) * tau * old
    return (1 - decoupled * lr * tau) * old - lr * (P[name] @ gradient)


@each_its_rate
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("case_name", ["mlp", "cnn"])
def test_learning_rate_and_weight_decay_by_group(kind, decoupled, case_name):
    case = CASES[case_name]()
    opt = make_for(
        kind,
        case,
        momentum=0.0,
        weight_decay=0.1,
        decoupled_weight_decay=decoupled,
        groups=three_groups(case.model, decoupled=decoupled),
        **unclipped(kind),
    )
    assert [len(group["params"]) for group in opt.param_groups][1] == 1
    train_on(opt, case, case.batches[:3])
    P = dense(opt)
    old = {name: vector(case.model, name, lambda p: p) for name in P}
    with opt.frozen():
        train_on(opt, case, case.batches[3:4])
    for name in P:
        new = vector(case.model, name, lambda p: p)
        # rounding of a step added to weights of size one
        torch.testing.assert_close(
            new, expected(opt, case.model, P, name, old[name]), rtol=1e-9, atol=1e-12
        )


@every
def test_weight_decay_of_the_constructor_is_that_of_a_group(kind):
    results = []
    for inside in (False, True):
        case = CASES["mlp"]()
        own = {"weight_decay": 0.2, "lr": 0.003}
        groups = [{"params": list(case.model.parameters()), **own}]
        opt = make_for(kind, case, **({"groups": groups} if inside else own))
        train_on(opt, case, case.batches[:4])
        results.append(weights(case.model))
    assert torch.equal(*results)


@each_its_rate
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_momentum_by_group(kind, momentum):
    """Under one P the step is P times the sum of gradients weighted as the form says."""
    case = CASES["mlp"]()
    layer = [case.model[2].weight, case.model[2].bias]
    opt = make_for(kind, case, groups=[{"params": layer, "momentum": momentum}], **unclipped(kind))
    keep, new = opt._harness.form(momentum)
    summed = {}
    for step, batch in enumerate(case.batches[:3]):
        P = dense(opt) if step else None
        old = {n: vector(case.model, n, lambda p: p) for n in P or ()}
        if step:
            with opt.frozen():
                train_on(opt, case, [batch])
        else:
            train_on(opt, case, [batch])
        for name in opt.preconditioner():
            gradient = vector(case.model, name, lambda p: p.grad)
            summed[name] = keep * summed.get(name, 0) + new * gradient
        for name in old:
            if owned(case.model, name)[0] in set(layer):
                moved = vector(case.model, name, lambda p: p) - old[name]
                step_of = -opt.param_groups[0]["lr"] * P[name] @ summed[name]
                torch.testing.assert_close(moved, step_of, rtol=1e-8, atol=1e-13)


@every
def test_damping_by_group(kind):
    """At lr=0 only the damping tells two runs apart: each layer has that of its own group."""

    def maps(**settings):
        case = CASES["mlp"]()
        if settings.pop("split", False):
            own = {"damping": 0.9, "params": case.model[2].parameters()}
            settings["groups"] = [own]
        opt = make_for(kind, case, lr=0.0, **settings)
        train_on(opt, case, case.batches[:1])
        return dense(opt)

    split, base, all_own = maps(split=True), maps(), maps(damping=0.9)
    for name, P in split.items():
        mine = name.startswith("2")
        torch.testing.assert_close(P, (all_own if mine else base)[name])
        assert not torch.allclose(P, (base if mine else all_own)[name], rtol=1e-3)


@every
def test_damping_changed_later_holds_from_the_next_refresh(kind):
    if kind in CLOSURE:
        pytest.skip("K-BFGS inverts its damping once, at the start")
    results = []
    for late in (False, True):
        case = CASES["mlp"]()
        settings = {"lr": 0.0, "refresh_every": 1}
        opt = make_for(kind, case, **settings, **({} if late else {"damping": 1.7}))
        train_on(opt, case, case.batches[:2])
        opt.param_groups[0]["damping"] = 1.7
        train_on(opt, case, case.batches[2:3])
        results.append(dense(opt))
    for name, P in results[0].items():
        torch.testing.assert_close(P, results[1][name])


@every
def test_learning_rate_schedulers(kind):
    case = CASES["mlp"]()
    opt = make_for(kind, case, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.0 if epoch == 1 else 1.0)
    train_on(opt, case, case.batches[:1])
    schedule.step()
    before, known = weights(case.model), state_of(opt)
    train_on(opt, case, case.batches[1:3])
    assert torch.equal(before, weights(case.model))
    assert not same(known, state_of(opt))
    schedule.step()
    train_on(opt, case, case.batches[3:4])
    assert not torch.equal(before, weights(case.model))
    for make in (
        lambda: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 5),
        lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(opt),
    ):
        make()


@every
def test_schedulers_of_the_damping(kind):
    """Through optim.damping.Damping: with lr=0 it alone tells two runs apart."""
    case = CASES["mlp"]()
    opt = make_for(kind, case, lr=0.0, refresh_every=1, damping=2.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(Damping(opt), 0.5)
    for batch in case.batches[:2]:
        train_on(opt, case, [batch])
        schedule.step()
    train_on(opt, case, case.batches[2:3])
    assert opt.param_groups[0]["damping"] == 0.5
    assert opt.param_groups[0]["lr"] == 0.0
    if kind in CLOSURE:
        return  # K-BFGS inverts its damping once, at the start
    other = CASES["mlp"]()
    twin = make_for(kind, other, lr=0.0, refresh_every=1, damping=0.5)
    train_on(twin, other, other.batches[:3])
    for P, Q in zip(dense(opt).values(), dense(twin).values(), strict=True):
        torch.testing.assert_close(P, Q)


@every
def test_group_added_later(kind):
    case = CASES["mlp"]()
    last = case.model[4]
    last.requires_grad_(False)
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:2])
    known, still = state_of(opt), copy.deepcopy(last.state_dict())
    last.requires_grad_(True)
    rate = opt.param_groups[0]["lr"] * (1 if kind in ONE_RATE else 1e-2)
    opt.add_param_group({"params": list(last.parameters()), "lr": rate, "weight_decay": 0.1})
    assert same(known, state_of(opt))
    assert [group["lr"] for group in opt.param_groups][1] == rate
    train_on(opt, case, case.batches[2:5])
    assert {group["step"] for group in opt.param_groups} == {5}
    assert not torch.equal(still["weight"], last.weight)
    assert not torch.equal(still["bias"], last.bias)
    named = {p for name in opt.preconditioner() for p in owned(case.model, name)}
    assert named == set(case.model.parameters())
    reloaded = make_for(kind, case)
    with pytest.raises(ValueError, match="group"):
        reloaded.load_state_dict(opt.state_dict())


@every
def test_groups_that_cannot_be(kind):
    case = CASES["mlp"]()
    own = [case.model[0].weight]
    with pytest.raises(ValueError, match="two of the groups"):
        make_for(kind, case, groups=[{"params": own}, {"params": own}])
    with pytest.raises(ValueError, match="1 parameters of the groups are not in Sequential"):
        make_for(kind, case, groups=[{"params": [torch.nn.Parameter(torch.ones(2))]}])
    with pytest.raises(ValueError, match="damping must be a positive number, got -1"):
        make_for(kind, case, groups=[{"params": own, "damping": -1}])
    shared = "update_every" if takes(kind, "update_every") else "kl_clip"
    with pytest.raises(ValueError, match=rf"\['{shared}'\] cannot differ between groups"):
        make_for(kind, case, groups=[{"params": own, shared: 7}])
    opt = make_for(kind, case)
    with pytest.raises(ValueError, match="cannot differ between groups"):
        opt.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], shared: 7})
