"""Tiny networks with one module, wiring or loss in question each: the rows of docs/backpack.md."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

N = 4


class Network(NamedTuple):
    """A problem's parts, and the layers asked for: one whose gradient passes through the module in
    question, then the module itself if it has parameters."""

    model: nn.Module
    inputs: Tensor
    layers: tuple[str, ...]
    loss: Callable = nn.CrossEntropyLoss()
    targets: Tensor = torch.tensor([0, 2, 1, 2])


def randomised(model):
    """No parameter or statistic keeps a value (0, 1) that could hide an error."""
    for own in [*model.parameters(), *model.buffers()]:
        if own.is_floating_point():
            own.data.uniform_(0.5, 1.5) if own.ndim == 1 else own.data.normal_()
    return model.eval()


def between(before, module, x):
    """before, module, Flatten, Linear to 3 outputs."""
    body = nn.Sequential(before, module, nn.Flatten()).eval()
    model = nn.Sequential(*body, nn.Linear(body(x).shape[1], 3))
    return Network(model, x, ("0", "1") if list(module.parameters()) else ("0",))


def vector(module):
    return lambda: between(nn.Linear(4, 5), module(), torch.randn(N, 4))


def image(dimensions, module):
    convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    size = 6 if dimensions < 3 else 2
    x_shape = (N, 1, *[size] * dimensions)
    return lambda: between(convolution(1, 2, 1), module(), torch.randn(x_shape))


class Wired(nn.Module):
    """Linear, what is in question, Linear, in a forward of its own."""

    def __init__(self, forward, *modules):
        super().__init__()
        self.first, self.wiring = nn.Linear(4, 5), forward
        self.inner = nn.ModuleList(modules)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.wiring(self.first(x), *self.inner))

    @property
    def steps(self):
        """What forward does, one after the other."""
        return self.first, lambda h: self.wiring(h, *self.inner), self.last


def wired(forward, *modules, layers=("first",)):
    return lambda: Network(Wired(forward, *(m() for m in modules)), torch.randn(N, 4), layers)


class Sequences(nn.Module):
    """A layer on sequences between Linear ones, as people write it."""

    def __init__(self, layer, apply):
        super().__init__()
        self.first, self.layer, self.apply_layer = nn.Linear(3, 2), layer, apply
        self.flatten, self.last = nn.Flatten(), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.flatten(self.apply_layer(self.layer, self.first(x))))


def sequences(make, apply=lambda layer, h: layer(h)[0]):
    return lambda: Network(Sequences(make(), apply), torch.randn(N, 2, 3), ("first", "layer"))


def embedding():
    model = nn.Sequential(nn.Embedding(5, 2), nn.Flatten(), nn.Linear(4, 3))
    return Network(model, torch.randint(5, (N, 2)), ("0",))


def tokens():
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))
    return Network(model, torch.randn(N, 2, 3), ("0",))


def twice(module):
    def make():
        shared = module()
        layers = [nn.Linear(4, 4), shared, nn.Linear(4, 4), shared, nn.Linear(4, 3)]
        own = ("1",) if list(shared.parameters()) else ()
        return Network(nn.Sequential(*layers), torch.randn(N, 4), ("0", *own))

    return make


def tied():
    layers = [nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)]
    layers[2].weight = layers[0].weight
    return Network(nn.Sequential(*layers), torch.randn(N, 4), ("0",))


def with_loss(loss, targets, outputs=3):
    def make():
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs))
        return Network(model, torch.randn(N, 4), ("0", "2"), loss, targets())

    return make


def positions():
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Conv1d(2, 3, 1))
    targets = torch.randint(3, (N, 2))
    return Network(model, torch.randn(N, 1, 3), ("0", "2"), targets=targets)


def classes():
    return torch.randint(3, (N,))


MODULES = {
    "Linear": vector(lambda: nn.Linear(5, 4)),
    "Linear on sequences": tokens,
    "Embedding": embedding,
    "Identity": vector(nn.Identity),
    "Flatten": vector(nn.Flatten),
    "Dropout": vector(nn.Dropout),
    "ReLU": vector(nn.ReLU),
    "ReLU(inplace=True)": vector(lambda: nn.ReLU(inplace=True)),
    "LeakyReLU": vector(lambda: nn.LeakyReLU(0.2)),
    "ELU": vector(lambda: nn.ELU(1.3)),
    "SELU": vector(nn.SELU),
    "Sigmoid": vector(nn.Sigmoid),
    "LogSigmoid": vector(nn.LogSigmoid),
    "Tanh": vector(nn.Tanh),
    "GELU": vector(nn.GELU),
    "SiLU": vector(nn.SiLU),
    "Softplus": vector(nn.Softplus),
    "Softmax": vector(lambda: nn.Softmax(1)),
    "BatchNorm1d": vector(lambda: nn.BatchNorm1d(5)),
    "BatchNorm2d": image(2, lambda: nn.BatchNorm2d(2)),
    "BatchNorm3d": image(3, lambda: nn.BatchNorm3d(2)),
    "LayerNorm": vector(lambda: nn.LayerNorm(5)),
    "GroupNorm": image(2, lambda: nn.GroupNorm(1, 2)),
    "Conv1d": image(1, lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1)),
    "Conv2d": image(2, lambda: nn.Conv2d(2, 2, (2, 3), stride=(3, 2), padding=(0, 1))),
    "Conv2d(dilation=2)": image(2, lambda: nn.Conv2d(2, 2, 2, stride=2, dilation=2)),
    "Conv2d(groups=2)": image(2, lambda: nn.Conv2d(2, 4, 3, stride=2, groups=2)),
    "Conv2d(padding='same')": image(2, lambda: nn.Conv2d(2, 2, 3, padding="same")),
    "Conv2d(padding_mode='circular')": image(
        2, lambda: nn.Conv2d(2, 2, 3, stride=2, padding=1, padding_mode="circular")
    ),
    "Conv3d": image(3, lambda: nn.Conv3d(2, 2, 2, padding=1, stride=2)),
    "ConvTranspose1d": image(1, lambda: nn.ConvTranspose1d(2, 3, 2, padding=3)),
    "ConvTranspose1d(output_padding=1)": image(
        1, lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, padding=3, output_padding=1)
    ),
    "ConvTranspose2d": image(2, lambda: nn.ConvTranspose2d(2, 2, 2, padding=2)),
    "ConvTranspose3d": image(3, lambda: nn.ConvTranspose3d(2, 2, 2)),
    "MaxPool1d": image(1, lambda: nn.MaxPool1d(3, stride=2, padding=1)),
    "MaxPool2d": image(2, lambda: nn.MaxPool2d(3, stride=2, padding=1)),
    "MaxPool3d": image(3, lambda: nn.MaxPool3d(2)),
    "AvgPool1d": image(1, lambda: nn.AvgPool1d(3, stride=2, padding=1)),
    "AvgPool2d": image(2, lambda: nn.AvgPool2d(3, stride=2, padding=1)),
    "AvgPool2d(ceil_mode=True)": image(2, lambda: nn.AvgPool2d(4, ceil_mode=True)),
    "AvgPool2d(divisor_override=3)": image(2, lambda: nn.AvgPool2d(2, divisor_override=3)),
    "AvgPool3d": image(3, lambda: nn.AvgPool3d(2)),
    "AdaptiveAvgPool1d": image(1, lambda: nn.AdaptiveAvgPool1d(3)),
    "AdaptiveAvgPool1d (uneven)": image(1, lambda: nn.AdaptiveAvgPool1d(4)),
    "AdaptiveAvgPool2d": image(2, lambda: nn.AdaptiveAvgPool2d(2)),
    "AdaptiveAvgPool3d": image(3, lambda: nn.AdaptiveAvgPool3d(1)),
    "AdaptiveMaxPool2d": image(2, lambda: nn.AdaptiveMaxPool2d(2)),
    "ZeroPad2d": image(2, lambda: nn.ZeroPad2d((1, 2, 0, 1))),
    "ReflectionPad2d": image(2, lambda: nn.ReflectionPad2d(1)),
    "Upsample": image(2, lambda: nn.Upsample(scale_factor=2)),
    "RNN": sequences(lambda: nn.RNN(2, 2, batch_first=True)),
    "RNN(nonlinearity='relu')": sequences(
        lambda: nn.RNN(2, 2, batch_first=True, nonlinearity="relu")
    ),
    "LSTM": sequences(lambda: nn.LSTM(2, 2, batch_first=True)),
    "LSTM(num_layers=2)": sequences(lambda: nn.LSTM(2, 2, num_layers=2, batch_first=True)),
    "GRU": sequences(lambda: nn.GRU(2, 2, batch_first=True)),
    "MultiheadAttention": sequences(
        lambda: nn.MultiheadAttention(2, 1, batch_first=True),
        lambda layer, h: layer(h, h, h, need_weights=False)[0],
    ),
}

WIRINGS = {
    "`x + f(x)`": wired(
        lambda h, f, act: h + act(f(h)),
        lambda: nn.Linear(5, 5),
        nn.Tanh,
        layers=("first", "inner.0"),
    ),
    "`0.5 * x`": wired(lambda h: 0.5 * h),
    "`x.flatten(1)`": wired(lambda h: h.flatten(1)),
    "`x.view(...)`": wired(lambda h: h.view(len(h), 5)),
    "`torch.tanh(x)`": wired(lambda h: torch.tanh(h)),
    "`F.relu(x, inplace=True)`": wired(lambda h: F.relu(h, inplace=True)),
    "an activation used twice": twice(nn.Tanh),
    "a layer used twice": twice(lambda: nn.Linear(4, 4)),
    "tied weights": tied,
}

LOSSES = {
    "MSELoss": with_loss(nn.MSELoss(), lambda: torch.randn(N, 3)),
    "CrossEntropyLoss": with_loss(nn.CrossEntropyLoss(), classes),
    "CrossEntropyLoss at several positions": positions,
    "CrossEntropyLoss(label_smoothing=0.1)": with_loss(
        nn.CrossEntropyLoss(label_smoothing=0.1), classes
    ),
    "CrossEntropyLoss of probabilities": with_loss(
        nn.CrossEntropyLoss(), lambda: torch.randn(N, 3).softmax(1)
    ),
    "CrossEntropyLoss of weights that do not sum to 1": with_loss(
        nn.CrossEntropyLoss(), lambda: torch.rand(N, 3) + 0.2
    ),
    "BCEWithLogitsLoss, one output": with_loss(
        nn.BCEWithLogitsLoss(), lambda: torch.randint(2, (N, 1)).to(torch.float64), 1
    ),
    "BCEWithLogitsLoss, several outputs": with_loss(
        nn.BCEWithLogitsLoss(), lambda: torch.randint(2, (N, 3)).to(torch.float64)
    ),
    "L1Loss": with_loss(nn.L1Loss(), lambda: torch.randn(N, 3)),
    "a function": with_loss(lambda z, t: F.mse_loss(z, t), lambda: torch.randn(N, 3)),
}
