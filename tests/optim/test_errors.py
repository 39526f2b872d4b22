"""Mistakes get an error that names the culprit and the way out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.optim import KBFGS, KFAC
from tests.optim.cases import (
    MAKE,
    OF_GRADIENTS,
    OF_PARAMETERS,
    autoencoder,
    batches,
    closure_of,
    each,
    loss_of,
    takes,
    train,
)

every = pytest.mark.parametrize("kind", each(MAKE))
OF_LAYERS = set(MAKE) - OF_GRADIENTS - OF_PARAMETERS
watching = pytest.mark.parametrize("kind", each(OF_LAYERS))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1}, "lr must be zero or positive, got -1"),
        ({"damping": 0}, "damping must be a positive number, got 0"),
        ({"damping": -0.5}, "damping must be a positive number, got -0.5"),
        ({"damping": float("nan")}, "damping must be"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\), got 1.0"),
        ({"decay": -0.1}, r"decay must lie in \[0, 1\), got -0.1"),
        ({"weight_decay": -1}, "weight_decay must be zero or positive"),
    ],
)
@every
def test_common_settings(kind, setting, message):
    if not takes(kind, *setting):
        pytest.skip("not a setting of it")
    with pytest.raises(ValueError, match=message):
        MAKE[kind](autoencoder(), **setting)


def test_own_settings():
    with pytest.raises(ValueError, match="history must be an integer of at least 1, got 0"):
        KBFGS(autoencoder(), history=0)


@every
@pytest.mark.parametrize("name", ["update_every", "refresh_every"])
def test_periods(kind, name):
    if not takes(kind, name):
        pytest.skip("not a setting of it")
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got 0"):
        MAKE[kind](autoencoder(), **{name: 0})


@every
def test_likelihoods(kind):
    if not takes(kind, "likelihood"):
        pytest.skip("not a setting of it")
    with pytest.raises(ValueError, match=r"no likelihood 'poisson'; known: .*categorical"):
        MAKE[kind](autoencoder(), likelihood="poisson")


@every
def test_models(kind):
    with pytest.raises(TypeError, match=r"do not pass model.parameters\(\)"):
        MAKE[kind](autoencoder().parameters())
    with pytest.raises(ValueError, match="no parameter with requires_grad=True"):
        MAKE[kind](autoencoder().requires_grad_(False))


def test_missing_closure():
    with pytest.raises(TypeError, match=r"needs a closure[\s\S]*def closure\(\)"):
        KBFGS(autoencoder()).step()


@every
def test_state_before_there_is_one(kind):
    model, x = autoencoder(), batches(1)[0]
    opt = MAKE[kind](model)
    with pytest.raises(RuntimeError, match="no state yet"):
        opt.preconditioner()
    with opt.frozen(), pytest.raises(RuntimeError, match=r"layer '0(\.weight)?' has no st"):
        train(opt, model, [x])


@every
def test_warm_up(kind):
    model, x = autoencoder(), batches(1)[0]
    opt = MAKE[kind](model)
    with pytest.raises(ValueError, match="saw no batch"):
        opt.warm_up([])
    no_batch = r"'0(\.weight)?' (saw no batch during|got no gradient in) warm_up"
    with pytest.raises(ValueError, match=no_batch):
        opt.warm_up([lambda: None])
    opt.warm_up([closure_of(opt, model, x)])
    train(opt, model, [x])
    with pytest.raises(RuntimeError, match="before the first step"):
        opt.warm_up([closure_of(opt, model, x)])


class Net(nn.Module):
    """A Linear used by the function given."""

    def __init__(self, use):
        super().__init__()
        self.layer, self.use = nn.Linear(6, 6), use

    def forward(self, x):
        return self.use(self.layer, x)


MISUSES = {
    r"layer 'layer' got an input of shape \(6,\); dimension 0 must be the batch": lambda layer, x: (
        torch.stack([layer(row) for row in x])
    ),
    "layer 'layer' has a gradient but its forward was not seen": lambda layer, x: F.linear(
        x, layer.weight, layer.bias
    ),
}


@watching
@pytest.mark.parametrize("message", sorted(MISUSES))
def test_misused_layers(kind, message):
    model, x = Net(MISUSES[message]), batches(1)[0]
    opt = MAKE[kind](model)
    with torch.no_grad():
        model(x)  # evaluation is nobody's business
    with pytest.raises(ValueError, match=message):
        train(opt, model, [x])


@watching
def test_layers_that_see_different_numbers_of_examples(kind):
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 3), nn.Linear(6, 6)

        def forward(self, x):
            return self.two(self.one(x.reshape(-1, 3)).reshape(-1, 6))

    model = Pairs()
    with pytest.raises(ValueError, match=r"saw .*examples.*dimension 0"):
        train(MAKE[kind](model), model, batches(1))


def test_closure_that_changes_batch():
    model, data = autoencoder(), iter([*batches(1, m=8), *batches(1, m=4)])
    opt = KBFGS(model)
    with pytest.raises(ValueError, match="both must use the same batch"):
        opt.step(lambda: closure_of(opt, model, next(data))())


def test_closure_that_needs_gradients_in_the_second_pass():
    model, x = autoencoder(), batches(1)[0]
    opt = KBFGS(model)

    def closure():
        loss = closure_of(opt, model, x)()
        model[0].weight.grad.clamp_(-1, 1)
        return loss

    with pytest.raises(AttributeError) as caught:
        opt.step(closure)
    assert "must allow for None" in caught.value.__notes__[0]
    assert model[0].weight.requires_grad


def test_output_that_is_no_tensor():
    model, x = Net(lambda layer, x: (layer(x), 1)), batches(1)[0]
    opt = KFAC(model)
    with pytest.raises(ValueError, match="Net returned tuple"):
        model(x)
    with torch.no_grad():
        model(x)
    opt = KFAC(model, likelihood="empirical")
    opt.zero_grad()


def test_part_of_the_model_called_alone():
    model, x = autoencoder(), batches(1)[0]
    opt = KFAC(model)
    opt.zero_grad()
    with pytest.raises(ValueError, match="call of the model itself"):
        model[0](x).sum().backward()


def test_bias_frozen_too_late():
    model, x = autoencoder(), batches(1)[0]
    opt = KFAC(model)
    model[0].bias.requires_grad_(False)
    loss_of(model, x).backward()
    with pytest.raises(ValueError, match="before the optimizer is built"):
        opt.step()


@every
def test_two_backwards_through_one_forward(kind):
    """The sum of two losses; rows of the data's labels are needed whole."""

    def closure():
        opt.zero_grad()
        loss = loss_of(model, x)
        (0.25 * loss).backward(retain_graph=True)
        (0.75 * loss).backward()
        return loss

    model, x = autoencoder(), batches(1)[0]
    opt = MAKE[kind](model)
    if opt._harness.delivers and kind in OF_LAYERS - {"eva"}:
        with pytest.raises(ValueError, match="two backwards through one forward"):
            opt.step(closure)
    else:
        opt.step(closure)
        twin = autoencoder()
        train(MAKE[kind](twin), twin, [x])
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(own, other)
