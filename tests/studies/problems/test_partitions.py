"""Problems with blocks of their own, and their models: autoencoder halves, residual blocks."""

import math

import pytest
import torch
from torch import nn

from kronscope.studies import problems
from kronscope.studies.problems import _networks as networks
from kronscope.studies.problems.autoencoders import (
    autoencoder,
    encoder_and_decoder,
    summed_squared_error,
)
from kronscope.studies.training import loop as training

PARTED = {name: p for name, p in problems.PROBLEMS.items() if p.partition}
SMALL = [name for name in PARTED if name.endswith("-small")]


def layers_of(model):
    """Names of the modules that hold parameters themselves."""
    return [
        name for name, m in model.named_modules() if next(m.parameters(False), None) is not None
    ]


def test_how_many_there_are():
    assert len(PARTED) >= 6
    assert len(SMALL) >= 3


@pytest.mark.parametrize("name", PARTED)
def test_every_layer_lies_in_one_part(name):
    problem = PARTED[name]
    model = problem.model()
    names = [name for part in problem.partition for name in part]
    assert set(names) <= {name for name, _ in model.named_modules()}
    layers = layers_of(model)
    assert len(layers) >= 4
    for layer in layers:
        inside = [name for name in names if f"{layer}.".startswith(f"{name}.")]
        assert len(inside) == 1, layer
    for part in problem.partition:
        assert any(f"{layer}.".startswith(f"{name}.") for name in part for layer in layers)


@pytest.mark.parametrize("name", SMALL)
def test_outputs_fit_the_data(name):
    """One logit for each class, or one output for each pixel; the loss is a mean over examples."""
    problem = PARTED[name]
    found, model = problem.data(), problem.model()
    x, t = found.test_inputs[:6].double(), found.test_targets[:6]
    t = t.double() if t.is_floating_point() else t
    output = model(x)
    assert output.shape == (t.shape if t.is_floating_point() else (6, 10))
    parts = [problem.loss(output[i : i + 2], t[i : i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(problem.loss(output, t), torch.stack(parts).mean())


@pytest.mark.slow  # all epochs
@pytest.mark.parametrize("name", SMALL)
def test_adam_lowers_the_loss(name):
    problem = PARTED[name]
    steps = training.steps(training.Settings(problem, "adam", problem.epochs))
    before = training.evaluate(next(steps), problem)["train_loss"]
    *_, state = steps
    found = training.evaluate(state, problem)
    assert found["train_loss"] < 0.5 * before
    assert found["test_loss"] < 0.6 * before


def test_squared_error_by_hand():
    output, targets = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert summed_squared_error(output, targets).item() == (1 + 4 + 9) / 4


def test_the_halves_are_the_autoencoder():
    sizes = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    model = problems.get("mnist-autoencoder-tanh").model()
    shapes = [m.out_features for m in model.modules() if isinstance(m, nn.Linear)]
    assert tuple(shapes) == sizes[1:]
    assert model.encoder[-1].out_features == model.decoder[0].in_features == 30
    small = (6, 4, 2, 4, 6)
    whole, halves = autoencoder(small, nn.Tanh), encoder_and_decoder(small, nn.Tanh)
    for ours, theirs in zip(halves.parameters(), whole.parameters(), strict=True):
        ours.data = theirs.data
    x = torch.randn(3, 6)
    torch.testing.assert_close(halves(x), whole(x))
    torch.testing.assert_close(halves.encoder(x), whole[:3](x))


def test_the_residual_network():
    model = networks.norm_free_resnet((16, 32, 64))
    assert sum(p.numel() for p in model.parameters()) == 75_050
    assert [name for name in layers_of(model) if "." not in name] == ["stem", "head"]
    x = torch.randn(2, 3, 32, 32)
    shapes = []
    for name, module in model.named_children():
        x = module(x)
        if name.startswith("block"):
            shapes.append(tuple(x.shape[1:]))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    assert x.shape == (2, 10)


def test_a_block_whose_second_convolution_is_zero_is_its_shortcut():
    block = networks.BasicBlock(2, 6, stride=2, norm=False)
    nn.init.zeros_(block.conv2.weight)
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 2, 4, 4)
    output = block(x)
    torch.testing.assert_close(output[:, 2:4], x[:, :, ::2, ::2].relu())
    assert output[:, :2].abs().max() == output[:, 4:].abs().max() == 0


def test_blocks_keep_the_size_of_what_passes():
    """The sum of squares grows by less than e over the three blocks, and does not fade."""
    model = networks.norm_free_resnet((32, 32, 32)).requires_grad_(False)
    for name in ("block2", "block3"):  # pictures of one size, so that sums can be compared
        getattr(model, name).stride = getattr(model, name).conv1.stride = 1
    before = model.relu(model.stem(torch.randn(8, 3, 16, 16)))
    after = model.block3(model.block2(model.block1(before)))
    assert 0.5 < (after.square().mean() / before.square().mean()) < math.e


def test_the_residual_network_differentiates_forwards_and_twice():
    """J of a direction forwards equals differences; the Hessian's product is symmetric."""
    model = problems.get("cifar10-small-resnet-small").model()
    named = {name: value.detach() for name, value in model.named_parameters()}
    x, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 9])

    def loss(named):
        return nn.functional.cross_entropy(torch.func.functional_call(model, named, (x,)), t)

    u, v = ({name: torch.randn_like(p) for name, p in named.items()} for _ in range(2))
    _, slope = torch.func.jvp(loss, (named,), (u,))
    ends = [loss({n: p + s * 1e-7 * u[n] for n, p in named.items()}) for s in (1, -1)]
    assert slope.item() == pytest.approx((ends[0] - ends[1]).item() / 2e-7, rel=1e-4)
    gradient = torch.func.grad(loss)
    Hu, Hv = (torch.func.jvp(gradient, (named,), (w,))[1] for w in (u, v))
    vHu, uHv = (sum((a[n] * b[n]).sum() for n in named) for a, b in ((v, Hu), (u, Hv)))
    torch.testing.assert_close(vHu, uHv)
    assert vHu != 0
