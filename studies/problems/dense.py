"""Classifiers of Linear layers: the network small enough for exact curvature of KFAC's paper."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from .. import data
from . import classifier, register


def tanh_network(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inward, outward in pairwise(sizes):
        layers += [nn.Linear(inward, outward), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


SETTINGS: dict[str, dict[str, Any]] = {
    "kbfgs": {"lr": 0.3, "damping": 0.03},
    "kbfgs_l": {"lr": 0.3, "damping": 0.03, "history": 100},
    "kfac": {"lr": 0.1, "damping": 0.003},
    "ekfac": {"lr": 0.1, "damping": 0.003},
    "tkfac": {"lr": 0.1, "damping": 0.003},
    "mbf": {"lr": 1e-3, "damping": 1e-3, "refresh_every": 1},
    "shampoo": {"lr": 0.01, "damping": 1e-4, "refresh_every": 1},
    "tnt": {"lr": 1e-4, "damping": 1e-3},
    "eva": {"lr": 0.1, "damping": 0.03, "kl_clip": 1e-3},
    "exact_fisher": {"lr": 0.1, "damping": 0.1},
    "layerwise_kfac": {"damping": 0.003},
    "hessian_free": {"lr": 0.1, "damping": 0.1},
    "block_hessian_free": {"lr": 0.1, "damping": 0.1},
    "adam": {"lr": 0.01},
    "sgd": {"lr": 0.1, "momentum": 0.9},
}

register(
    classifier(
        name="mnist16-tanh",
        summary="MNIST at 16x16, 256-20-20-20-20-20-10, tanh; exact curvature in KFAC's paper",
        model=lambda: tanh_network((256, 20, 20, 20, 20, 20, 10)),
        data=data.mnist16,
        batch_size=1000,
        epochs=20,
        measure_damping=0.01,
        optimizers=SETTINGS,
    ),
    summary="scikit-learn's 8x8 digits, 64-20-20-20-20-20-10, tanh; runs in seconds, for tests",
    model=lambda: tanh_network((64, 20, 20, 20, 20, 20, 10)),
    data=data.digits_classes,
)
