"""A loss that does not belong to the likelihood of the sampled labels is noticed at once."""

import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.optim import EKFAC, KFAC, TKFAC, TNT, ExactFisher

KINDS = [KFAC, EKFAC, TKFAC, TNT, ExactFisher]
LOSSES = {
    "categorical": lambda z, t: F.cross_entropy(z, t),
    "smoothed": lambda z, t: F.cross_entropy(z, t, label_smoothing=0.1),
    "bernoulli": lambda z, t: (
        F.binary_cross_entropy_with_logits(z, F.one_hot(t, 3).float(), reduction="sum") / len(z)
    ),
    "gaussian": lambda z, t: (z - F.one_hot(t, 3)).square().sum() / (2 * len(z)),
}


def step(opt, model, loss, dtype=None):
    x, t = torch.randn(12, 5), torch.randint(3, (12,))
    opt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
        z = model(x)
    LOSSES[loss](z.float(), t).backward()
    opt.step()


def made(kind, likelihood):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    return model, kind(model, lr=1e-3, likelihood=likelihood)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("likelihood", "loss", "finding"),
    [
        ("bernoulli", "categorical", "sums to zero"),
        ("bernoulli", "smoothed", "sums to zero"),
        ("categorical", "bernoulli", "does not sum to zero"),
        ("categorical", "gaussian", "does not sum to zero"),
    ],
)
def test_a_loss_of_another_likelihood_is_warned_of_once(kind, likelihood, loss, finding):
    model, opt = made(kind, likelihood)
    with pytest.warns(UserWarning, match=f"{finding}.*likelihood='{likelihood}'"):
        step(opt, model, loss)
    step(opt, model, loss)  # another warning would be an error here
    assert opt.param_groups[0]["step"] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("likelihood", "loss"),
    [
        ("categorical", "categorical"),
        ("categorical", "smoothed"),
        ("bernoulli", "bernoulli"),
        ("gaussian", "gaussian"),
    ],
)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_nothing_is_said_where_they_fit(kind, likelihood, loss, dtype):
    model, opt = made(kind, likelihood)
    before = len(model._forward_hooks)
    step(opt, model, loss, dtype)
    assert len(model._forward_hooks) == before - 1  # it has taken itself away


def test_a_resumed_run_is_not_looked_at_and_settings_come_with_the_state():
    model, opt = made(KFAC, "categorical")
    first = opt.state_dict()
    assert first["param_groups"][0]["step"] == 0
    step(opt, model, "categorical")
    for state in (first, opt.state_dict()):
        twin_model, twin = made(KFAC, "bernoulli")
        twin.load_state_dict(state)
        before = len(twin_model._forward_hooks)
        step(twin, twin_model, "categorical")
        assert len(twin_model._forward_hooks) == before - 1


def test_evaluations_and_losses_of_one_output_say_nothing():
    torch.manual_seed(0)
    model = nn.Linear(5, 1)
    opt = KFAC(model, lr=1e-3)
    with torch.no_grad():
        model(torch.randn(4, 5))
    opt.zero_grad()
    z = model(torch.randn(4, 5))
    F.binary_cross_entropy_with_logits(z, torch.ones(4, 1)).backward()
    opt.step()
    model, opt = made(KFAC, "bernoulli")
    opt.zero_grad()
    (0.0 * model(torch.randn(4, 5))).sum().backward()  # a gradient of zeros tells nothing
    opt.step()


def test_a_model_is_pickled_with_it():
    model, _ = made(KFAC, "bernoulli")
    twin = pickle.loads(pickle.dumps(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.cross_entropy(twin(torch.randn(4, 5)), torch.zeros(4, dtype=torch.long)).backward()
