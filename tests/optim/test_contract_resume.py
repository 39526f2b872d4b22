"""A checkpoint at any step goes on bit for bit, over all methods."""

import copy
import io

import pytest
import torch

from tests.optim.cases import (
    MAKE,
    ONE_EACH,
    autoencoder,
    batches,
    closure_of,
    dense,
    each,
    make_for,
    same,
    state_of,
    train,
    train_on,
    weights,
)
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
one_each = pytest.mark.parametrize("kind", each(ONE_EACH))
SETTINGS = {"update_every": 2, "refresh_every": 3, "weight_decay": 1e-3}


def saved(model, opt):
    """What torch.load(weights_only=True) gives back of both."""
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def check_resume(kind, name, settings, phases):
    """From each phase a new model and optimizer go on exactly as the first ones."""
    case = CASES[name]()
    opt = make_for(kind, case, **settings)
    checkpoints, losses = {}, []
    for step, batch in enumerate(case.batches[:9]):
        if step in phases:
            checkpoints[step] = saved(case.model, opt)
        losses += train_on(opt, case, [batch])
    for step, checkpoint in checkpoints.items():
        twin = CASES[name]()
        with torch.no_grad():
            for p in twin.model.parameters():
                p.add_(1.0)
        torch.manual_seed(77 + step)  # another seed of labels
        resumed = make_for(kind, twin, lr=9.0, **settings)
        twin.model.load_state_dict(checkpoint["model"])
        resumed.load_state_dict(checkpoint["opt"])
        assert train_on(resumed, twin, twin.batches[step:9]) == losses[step:]
        assert torch.equal(weights(case.model), weights(twin.model))
        assert same(state_of(opt), state_of(resumed))
        for P, Q in zip(dense(opt).values(), dense(resumed).values(), strict=True):
            assert torch.equal(P, Q)


@every
@pytest.mark.parametrize("stagger", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_resume_at_every_phase(kind, stagger):
    check_resume(kind, "mlp", {**SETTINGS, "stagger": stagger}, range(7))


@one_each
@pytest.mark.parametrize("name", ["cnn", pytest.param("shared", marks=pytest.mark.slow)])
def test_resume_on_other_layers(kind, name):
    check_resume(kind, name, {**SETTINGS, "stagger": name == "cnn"}, [1, 2, 5])


@one_each
@pytest.mark.parametrize("phase", [0, pytest.param(1, marks=pytest.mark.slow), 4])
def test_resume_after_warm_up(kind, phase):
    data, model = batches(7), autoencoder()
    opt = MAKE[kind](model)
    opt.warm_up([closure_of(opt, model, x) for x in data[:2]])
    train(opt, model, data[:phase])
    checkpoint = saved(model, opt)
    expected = train(opt, model, data[phase:])
    torch.manual_seed(77)
    twin = autoencoder()
    twin.load_state_dict(checkpoint["model"])
    resumed = MAKE[kind](twin)
    resumed.load_state_dict(checkpoint["opt"])
    assert train(resumed, twin, data[phase:]) == expected
    assert torch.equal(weights(model), weights(twin))
    assert same(state_of(opt), state_of(resumed))


@every
def test_a_checkpoint_stays_as_it_was_saved(kind):
    """Training on changes neither the dictionary saved nor the one loaded."""
    case = CASES["mlp"]()
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:2])
    loaded = copy.deepcopy(opt.state_dict())
    resumed = make_for(kind, case)
    resumed.load_state_dict(loaded)
    before = copy.deepcopy(loaded)
    train_on(resumed, case, case.batches[2:5])
    for index, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(value, loaded["state"][index][key]), key


@one_each
def test_going_back_in_one_optimizer(kind):
    """load_state_dict into the optimizer that trains: the second run repeats the first."""
    case = CASES["cnn"]()
    opt = make_for(kind, case, **SETTINGS)
    train_on(opt, case, case.batches[:2])
    checkpoint = saved(case.model, opt)
    losses = train_on(opt, case, case.batches[2:7])
    final = state_of(opt)
    case.model.load_state_dict(checkpoint["model"])
    opt.load_state_dict(checkpoint["opt"])
    assert train_on(opt, case, case.batches[2:7]) == losses
    assert same(final, state_of(opt))


@every
def test_low_precision_model_keeps_float32_factors(kind):
    model, data = autoencoder().to(torch.bfloat16), [x.to(torch.bfloat16) for x in batches(4)]
    opt = MAKE[kind](model)
    train(opt, model, data[:2])
    checkpoint = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(checkpoint)
    for state, other in zip(opt.state.values(), checkpoint["state"].values(), strict=True):
        for key, value in state.items():
            counter = key in ("counts", "nonfinite", "restarts", "seen") or key.endswith("failures")
            usual = torch.bool if key == "broken" else torch.float32
            assert value.dtype == (torch.int64 if counter else usual), key
            assert torch.equal(value, other[key])
    train(opt, model, data[2:])
    assert model[0].weight.dtype == torch.bfloat16
