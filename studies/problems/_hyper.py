"""Hyper-parameters as data: schedules, initial values, what is searched, and where it comes from.

A source begins with "published" (read in code or notebooks of authors), "recalled" (from memory of
a paper: a default to be tested, never to be cited) or "ours".
"""

import tomllib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

SOURCES = "published", "recalled", "ours"
OURS = "ours"
KBFGS_DEMO = "published: demo of arXiv:2006.08877"
TNT_DEMO = "published: demo of arXiv:2106.02925"
TNT_CODE = "published: code of arXiv:2106.02925"
EVA_CODE = "published: code of arXiv:2308.02123, for convolutional networks, batch 128"
TENGRAD_CODE = "published: benchmark of TENGraD's authors"
OPEN = "ours: around what is recommended, as `kronscope tune grid`; no paper's values are known"

# how networks begin
PYTORCH = "PyTorch's: weights and biases uniform in ±1/√inputs"
KAIMING = "weights normal of variance 2 / inputs (Kaiming), biases PyTorch's"
VGG = "convolutions normal of variance 2 / (9 channels out), biases zero; Linear layers PyTorch's"
NORM_FREE = (
    "convolutions normal of variance 2 / inputs, 1 / (inputs · blocks) for the second of a block, "
    "biases zero; Linear layers PyTorch's"
)
LSTM = "uniform in ±1/√units, peepholes zero; Linear layers PyTorch's"

# {problem or family: {optimizer: recommended hyper-parameters}}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = tomllib.loads(
    (files(__package__) / "settings.toml").read_text(encoding="utf-8")
)

LR_FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
DAMPING_FACTORS = (0.03, 0.1, 0.3, 1.0, 3.0)


@dataclass(frozen=True)
class Schedule:
    """Learning-rate schedule: linear warm-up, then cuts by a factor at milestones.

    epochs: of the whole training. milestones: numbers of epochs after which the rate is multiplied
    by `factor`. warm_up: epochs until the rate is whole, the first of which has 1 / warm_up of it.

        >>> plan = Schedule(epochs=100, milestones=(40, 80), warm_up=2)
        >>> [round(plan.rate(epoch), 3) for epoch in (0, 1, 39, 40, 79, 80)]
        [0.5, 1.0, 1.0, 0.1, 0.1, 0.01]
    """

    epochs: int
    milestones: tuple[int, ...]
    factor: float = 0.1
    warm_up: int = 0
    source: str = OURS

    def rate(self, epoch: int) -> float:
        """Factor of the learning rate in an epoch, counted from 0."""
        risen = min(1.0, (epoch + 1) / self.warm_up) if self.warm_up else 1.0
        return risen * self.factor ** bisect_right(self.milestones, epoch)

    def scheduler(self, optimizer: Optimizer) -> LambdaLR:
        """Scheduler of this optimizer; its step() is to be called after each epoch."""
        return LambdaLR(optimizer, lambda epoch: self.rate(epoch))


@dataclass(frozen=True)
class Searched:
    """Values that each hyper-parameter is tried at, and whose they are."""

    grid: Mapping[str, tuple[float, ...]]
    source: str


def half_decades(low: float, high: float) -> tuple[float, ...]:
    """1 and 3 times powers of ten, from `low` to `high`, both ends included.

    >>> half_decades(0.003, 0.1)
    (0.003, 0.01, 0.03, 0.1)
    """
    values = [float(f"{digit}e{power}") for power in range(-8, 3) for digit in (1, 3)]
    return tuple(value for value in values if low <= value <= high)


def around(
    recommended: Mapping[str, Any],
    lr_factors: Sequence[float] = LR_FACTORS,
    damping_factors: Sequence[float] = DAMPING_FACTORS,
) -> dict[str, tuple[float, ...]]:
    """The recommended lr and damping times the factors, in two digits, where there is one.

    A kl_clip takes the squares of the lr's factors, and the lr then stays: clipped steps have a
    length of its root, whatever the lr.

    >>> around({"lr": 0.3, "momentum": 0.9}, lr_factors=(0.1, 1.0, 10.0))
    {'lr': (0.03, 0.3, 3.0)}
    """
    factors = {"lr": lr_factors, "damping": damping_factors}
    if "kl_clip" in recommended:
        factors = {"kl_clip": [f**2 for f in lr_factors], "damping": damping_factors}
    return {
        name: tuple(float(f"{recommended[name] * factor:.2g}") for factor in factors[name])
        for name in factors
        if name in recommended
    }


def ours(recommended: Mapping[str, Any]) -> Searched:
    """Our own search around recommended values, where no paper's is known."""
    return Searched(around(recommended), OPEN)


# what was tuned is published: learning rate and damping, and ε of Adam; by training loss
_TUNED = "recalled: of {} the names of what was tuned are published, the values are not"
AUTOENCODERS = {
    name: Searched(grid, _TUNED.format(paper))
    for name, paper, grid in (
        ("kbfgs", "K-BFGS", {"lr": half_decades(0.01, 3), "damping": half_decades(0.03, 3)}),
        ("kbfgs_l", "K-BFGS", {"lr": half_decades(0.01, 3), "damping": half_decades(0.03, 3)}),
        ("kfac", "K-BFGS", {"lr": half_decades(0.01, 3), "damping": half_decades(0.1, 10)}),
        ("shampoo", "TNT", {"lr": half_decades(1e-5, 3e-3), "damping": half_decades(1e-4, 0.01)}),
        ("tnt", "TNT", {"lr": half_decades(1e-6, 1e-3), "damping": half_decades(0.01, 1)}),
        ("adam", "TNT", {"lr": half_decades(1e-5, 0.01), "eps": (1e-8, 1e-4, 0.01)}),
        ("sgd", "TNT", {"lr": half_decades(1e-4, 0.03)}),
    )
}

# learning rate and weight decay, the damping fixed; Shampoo's and TNT's weight decay is decoupled
CONVOLUTIONAL = {
    name: Searched(grid, _TUNED.format("TNT"))
    for name, grid in (
        ("kfac", {"lr": half_decades(1e-3, 0.3), "weight_decay": half_decades(1e-4, 0.01)}),
        ("shampoo", {"lr": half_decades(3e-4, 0.1), "weight_decay": half_decades(0.01, 1)}),
        ("tnt", {"lr": half_decades(1e-5, 1e-3), "weight_decay": half_decades(1, 30)}),
        ("adam", {"lr": half_decades(1e-5, 0.01), "weight_decay": half_decades(1e-5, 1e-3)}),
        ("sgd", {"lr": half_decades(3e-3, 0.3), "weight_decay": half_decades(1e-4, 0.01)}),
    )
}

_LIKE_KFAC = Schedule(100, (40, 80), source=OURS)
CIFAR_SCHEDULES = {
    **{name: _LIKE_KFAC for name in ("ekfac", "tkfac", "exact_fisher")},
    **{name: Schedule(100, (40, 80), source=TNT_CODE) for name in ("kfac", "shampoo", "tnt")},
    **{name: Schedule(200, (60, 120, 180), source=TNT_CODE) for name in ("adam", "sgd")},
    **{
        name: Schedule(60, (10, 20, 30, 40, 50), 0.5, source=f"{TENGRAD_CODE}, CIFAR-10")
        for name in ("kbfgs", "kbfgs_l")
    },
    "mbf": Schedule(100, (40, 80), source="recalled: arXiv:2202.04124, 100 or 150 epochs"),
    "eva": Schedule(100, (35, 75, 90), warm_up=5, source=f"{EVA_CODE}; the milestones are ours"),
}
