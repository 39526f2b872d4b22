"""Tiny seeded models with data, loss and likelihood: what optimizers and oracles are run on."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F


class Case(NamedTuple):
    """A model, batches (x, t), loss(model, batch) = a mean over examples, its likelihood."""

    model: nn.Module
    batches: list
    loss: Callable
    likelihood: str


class Shared(nn.Module):
    """Layers that see several rows per example: two at T positions, one called twice."""

    def __init__(self):
        super().__init__()
        self.spread = nn.Linear(3, 4)
        self.mix = nn.Linear(4, 4)
        self.cell = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        h = torch.tanh(self.mix(torch.tanh(self.spread(x)))).mean(1)
        for _ in range(2):
            h = torch.tanh(self.cell(h))
        return self.last(h)


def bernoulli_loss(model, batch):
    x, t = batch
    return F.binary_cross_entropy_with_logits(model(x), t, reduction="sum") / len(x)


def categorical_loss(model, batch):
    x, t = batch
    return F.cross_entropy(model(x), t)


def gaussian_loss(model, batch):
    x, t = batch
    return 0.5 * (model(x) - t).square().sum() / len(x)


def seeded(make):
    """make() in float64 from a seed of its own; the global generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return make().double()


def normal(*shape, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def mlp(count=10, m=8):
    """6-4-3-6 tanh autoencoder, cross-entropy of logits summed over outputs."""
    data = (
        normal(count, m, 2) @ normal(2, 6, seed=3) + 0.3 * normal(count, m, 6, seed=4)
    ).sigmoid()
    model = seeded(
        lambda: nn.Sequential(
            nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 6)
        )
    )
    return Case(model, [(x, x) for x in data], bernoulli_loss, "bernoulli")


def cnn(count=10, m=8, kernel=2, padding_mode="circular"):
    """Stride, with a row left over; groups and dilation; no bias and padding="same"; Linear.

    With zeros as padding take an odd kernel: PyTorch warns of the copy that an even one needs.
    """
    same = {"padding": "same", "padding_mode": padding_mode, "bias": False}
    model = seeded(
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2, padding=1),
            nn.Tanh(),
            nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2),
            nn.Tanh(),
            nn.Conv2d(4, 3, kernel, **same),
            nn.Flatten(),
            nn.Linear(27, 3),
        )
    )
    classes = torch.randint(3, (count, m), generator=torch.Generator().manual_seed(5))
    batches = list(zip(normal(count, m, 2, 6, 6), classes, strict=True))
    return Case(model, batches, categorical_loss, "categorical")


def shared(count=10, m=8):
    """Weight sharing over T = 3 positions and over two calls, half the squared error."""
    x, t = normal(count, m, 3, 3), normal(count, m, 2, seed=6)
    return Case(seeded(Shared), list(zip(x, t, strict=True)), gaussian_loss, "gaussian")


CASES = {"mlp": mlp, "cnn": cnn, "shared": shared}
# what a test over all cases takes: "shared" has Linear layers with one row per example too
NAMES = ["cnn", "shared", pytest.param("mlp", marks=pytest.mark.slow)]
