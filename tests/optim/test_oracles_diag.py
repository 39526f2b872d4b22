"""The oracles against diag, an engine of its own, on the data's labels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.diag import Problem, approximations, exact
from kronscope.diag.operators import dense
from tests.optim.models import CASES
from tests.optim.oracles import ORACLES
from tests.optim.oracles_base import layers_of as all_layers


def snapshot(case, method, **settings):
    """Curvature of an oracle without memory after one step, and diag's problem of its batch."""
    model, batches, loss, _ = CASES[case]()
    if method != "ExactFisher":
        settings = {"decay": 0.0, **settings}
    oracle = ORACLES[method](model, loss, lr=0.1, damping=0.3, **settings)
    oracle.step(batches[0])
    return oracle.curvature, Problem(model, criterion(case), *batches[0]), model


PER_EXAMPLE = {"estimator": "per_example"}
DIAG = {
    "kfac": ("KFAC", {}, {}),
    "ekfac": ("EKFAC", {}, {}),
    "tkfac": ("TKFAC", {}, {}),
    "mini_block": ("MBF", {"fc_share": False, **PER_EXAMPLE}, {}),
    "mini_block_shared": ("MBF", PER_EXAMPLE, {}),
    "mini_block_input": ("MBF", {"fc_share": False, "fc_group": "input", **PER_EXAMPLE}, {}),
    "mini_block_input_shared": ("MBF", {"fc_group": "input", **PER_EXAMPLE}, {}),
    "mini_block_kernel": ("MBF", PER_EXAMPLE, {}),
    "shampoo": ("Shampoo", {}, {"batch": 8}),
    "tnt": ("TNT", {}, {"batch": 8}),
}


def criterion(case):
    """The loss as function of output and targets."""
    if case == "cnn":
        return F.cross_entropy
    if case == "mlp":
        return lambda z, t: F.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)
    return lambda z, t: 0.5 * (z - t).square().sum() / len(z)


def of_layer(method, curvature, name, layer):
    """The layer's block: Shampoo's and TNT's weight and bias put side by side."""
    if method not in ("Shampoo", "TNT"):
        return curvature[name]
    out, size = len(layer.weight), layer.weight[0].numel()
    width = size + (layer.bias is not None)
    index, total = torch.arange(out * width).reshape(out, width), torch.zeros(2 * (out * width,))
    for part, columns in (("weight", slice(size)), ("bias", slice(size, None))):
        if f"{name}.{part}" in curvature:
            where = index[:, columns].reshape(-1)
            total[where[:, None], where] = curvature[f"{name}.{part}"]
    return total


def layers_of(approximation, model):
    """Layers that both know: no groups but for kernel slices, which are of convolutions."""
    for name, layer in all_layers(model).items():
        conv, groups = isinstance(layer, nn.Conv2d), getattr(layer, "groups", 1)
        if approximation == "mini_block_kernel":
            known = conv
        else:
            known = not conv if approximation.startswith("mini_block") else groups == 1
        if known:
            yield name, layer


@pytest.mark.parametrize(("case", "layers"), [("mlp", 3), ("cnn", 3), ("shared", 4)])
@pytest.mark.parametrize("approximation", sorted(DIAG))
def test_agrees_with_diag(case, layers, approximation):
    method, settings, options = DIAG[approximation]
    curvature, problem, model = snapshot(case, method, **settings)
    function, count = getattr(approximations, approximation), 0
    for name, layer in layers_of(approximation, model):
        theirs = dense(function(problem, problem.block(name), of="empirical_fisher", **options))
        ours = of_layer(method, curvature, name, layer)
        # TNT's own is of mini-batch means, diag's in the scale of the Fisher
        torch.testing.assert_close(8 * ours if method == "TNT" else ours, theirs)
        count += 1
    if approximation.startswith("mini_block"):
        layers = {"cnn": 1}.get(case, layers)
    if approximation == "mini_block_kernel":
        layers = {"cnn": 3}.get(case, 0)
    assert count == layers


@pytest.mark.parametrize("case", sorted(CASES))
def test_exact_fisher_agrees_with_diag(case):
    curvature, problem, _ = snapshot(case, "ExactFisher")
    for name, F_l in curvature.items():
        theirs = dense(exact.empirical_fisher(problem, problem.block(name)))
        torch.testing.assert_close(F_l, theirs)
