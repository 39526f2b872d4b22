"""A checkpoint of HessianFree goes on bit for bit; a checkpoint stays as it was saved."""

import copy
import io

import pytest
import torch
from torch import nn

from kronscope.optim import HessianFree, MartensHessianFree
from tests.optim.cases import autoencoder, batches, closure_of, same, state_of, weights
from tests.optim.methods.hessian_free.cases import (
    both,
    make,
    make_for,
    step,
)
from tests.optim.models import CASES


def factor(opt):
    return float(getattr(opt, "factor", 1.0))


def saved(model, opt):
    """What torch.load(weights_only=True) gives back of both."""
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def with_layer(place, layer, *args):
    """The small case with another layer before an activation."""

    def make():
        case = CASES["mlp"]()
        case.model[place] = nn.Sequential(layer(*args), nn.Tanh())
        return case

    return make


MAKERS = {
    **CASES,
    "dropout": with_layer(1, nn.Dropout, 0.3),
    "norm": with_layer(3, nn.BatchNorm1d, 3),
}


@pytest.mark.parametrize(
    ("name", "method", "blocks"),
    [
        ("shared", HessianFree, []),
        ("dropout", HessianFree, []),
        ("norm", HessianFree, None),
        ("dropout", MartensHessianFree, None),
        ("shared", MartensHessianFree, []),
    ],
)
def test_resume_at_every_phase(name, method, blocks):
    """With a group, a scheduler's rate and a failed step on the way."""
    adaptive = method is MartensHessianFree
    torch.manual_seed(2)

    def built(lr):
        case = MAKERS[name]()
        own = [{"params": [next(case.model.parameters())], "lr": lr / 2, "momentum": 0.5}]
        known = {"lr": lr, "weight_decay": 0.01, "curvature_batch": 6, "groups": own}
        return case, make_for(case, blocks, method=method, **known)

    def once(case, opt, i):
        """A loss and the generator's place after it; step 3 fails."""
        torch.manual_seed(100 + i)
        x, t = case.batches[i]
        loss = step(opt, case, (x * float("nan"), t) if i == 3 else (x, t))
        return str(loss), torch.get_rng_state().sum().item(), opt.rows.tolist(), factor(opt)

    case, opt = built(0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
    schedules, checkpoints, seen = {}, {}, []
    for i in range(7):
        checkpoints[i], schedules[i] = saved(case.model, opt), schedule.state_dict().copy()
        seen.append(once(case, opt, i))
        schedule.step()
    assert (len({place[-1] for place in seen}) > 1) == adaptive
    for i, checkpoint in checkpoints.items():
        torch.manual_seed(77 + i)
        twin, resumed = built(9.0)
        schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.9)
        twin.model.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["opt"])
        schedule.load_state_dict(schedules[i])
        assert int(resumed.state_dict()["failures"]) == (i == 4)
        for j in range(i, 7):
            assert once(twin, resumed, j) == seen[j]
            schedule.step()
        assert torch.equal(weights(case.model), weights(twin.model))
        assert same(state_of(opt), state_of(resumed))
        assert resumed.summary() == opt.summary()


@both
def test_failures_in_a_row_go_on_counting(blocks):
    case = CASES["mlp"]()
    x, t = case.batches[0]
    bad = (x * float("nan"), t)
    opt = make_for(case, blocks)
    step(opt, case, bad)
    step(opt, case, bad)
    resumed = make_for(case, blocks)
    resumed.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="3 steps in a row"):
        step(resumed, case, bad)


@both
def test_going_back_in_one_optimizer(blocks):
    case = CASES["cnn"]()
    opt = make_for(case, blocks, curvature_batch=3, method=MartensHessianFree)
    for batch in case.batches[:2]:
        step(opt, case, batch)
    checkpoint = saved(case.model, opt)
    losses = [step(opt, case, batch) for batch in case.batches[2:6]]
    final = state_of(opt)
    case.model.load_state_dict(checkpoint["model"])
    opt.load_state_dict(checkpoint["opt"])
    assert [step(opt, case, batch) for batch in case.batches[2:6]] == losses
    assert same(final, state_of(opt))


@both
def test_a_checkpoint_stays_as_it_was_saved(blocks):
    """Training on changes nothing of the dictionary loaded from."""
    case = CASES["mlp"]()
    opt = make_for(case, blocks, method=MartensHessianFree)
    for batch in case.batches[:2]:
        step(opt, case, batch)
    loaded = copy.deepcopy(opt.state_dict())
    resumed, before = make_for(case, blocks, method=MartensHessianFree), copy.deepcopy(loaded)
    resumed.load_state_dict(loaded)
    for batch in case.batches[2:5]:
        step(resumed, case, batch)
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, loaded["state"][index][key]), key
    for key in ("rows", "factor", "failures"):
        assert torch.equal(before[key], loaded[key])
        assert not torch.equal(before["rows"], resumed.state_dict()["rows"])


@both
def test_a_bfloat16_model_keeps_float32_solutions(blocks):
    model, data = autoencoder().to(torch.bfloat16), [x.to(torch.bfloat16) for x in batches(6)]
    opt = make(model, blocks)
    losses = [opt.step(closure_of(opt, model, x)).item() for x in data[:2]]
    checkpoint = saved(model, opt)
    opt.load_state_dict(checkpoint["opt"])
    for index, state in checkpoint["opt"]["state"].items():
        own = opt.state[list(model.parameters())[index]]
        for key, value in own.items():
            assert value.dtype == (torch.int64 if key == "counts" else torch.float32), key
            assert torch.equal(value, state[key])
    losses += [opt.step(closure_of(opt, model, x)).item() for x in data[2:]]
    assert losses[-1] < losses[0]
    assert model[0].weight.dtype == torch.bfloat16
