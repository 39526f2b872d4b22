"""Small networks and loops shared by the optimizer tests."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

from optim import KBFGS, KFAC

SIZES = (6, 5, 3, 5, 6)
MAKE = {
    "kbfgs": lambda model, **kw: KBFGS(model, **kw),
    "kbfgs-l": lambda model, **kw: KBFGS(model, history=3, **kw),
    "kfac": lambda model, **kw: KFAC(model, lr=0.3, damping=0.3, refresh_every=3, **kw),
    "kfac-empirical": lambda model, **kw: KFAC(model, lr=0.3, likelihood="empirical", **kw),
}
STATISTICS = ("A", "H_a", "H_g", "S", "Y", "R", "YY", "s", "y", "G", "A_inv", "G_inv")


def autoencoder(sizes=SIZES, activation=nn.Tanh):
    torch.manual_seed(1)
    layers = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def batches(count, m=16, size=6, seed=2):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(2, size, generator=generator)
    codes = torch.randn(count, m, 2, generator=generator)
    return list((codes @ basis).mul(2).sigmoid())


def loss_of(model, x):
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


def closure_of(opt, model, x):
    def closure():
        opt.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    return closure


def train(opt, model, data):
    return [opt.step(closure_of(opt, model, x)).item() for x in data]


def blocks(model):
    """Name and module of every Linear."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear}


def w_bar(layer):
    """[W, b], detached."""
    parts = [layer.weight] + ([layer.bias[:, None]] if layer.bias is not None else [])
    return torch.cat([p.detach().clone() for p in parts], 1)


def gradient(layer):
    """Gradient of [W, b]."""
    return torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1).clone()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def statistics(opt):
    return [
        {k: v.clone() for k, v in state.items() if k in STATISTICS} for state in opt.state.values()
    ]
