"""Convolutional classifiers: a small one on a part of CIFAR-10, and one of seconds for tests."""

from typing import Any

from torch.nn.functional import cross_entropy

from studies import data
from studies.networks import strided_cnn
from studies.problems import TrainingProblem, register

SETTINGS: dict[str, dict[str, Any]] = {
    "kbfgs": {"lr": 0.3, "damping": 0.3},
    "kbfgs_l": {"lr": 0.3, "damping": 0.3, "history": 100},
    "kfac": {"lr": 0.1, "damping": 0.03},
    "ekfac": {"lr": 0.1, "damping": 0.03},
    "tkfac": {"lr": 0.1, "damping": 0.03},
    "mbf": {"lr": 3e-4, "damping": 3e-3, "refresh_every": 5},
    "shampoo": {"lr": 0.01, "damping": 0.01},
    "tnt": {"lr": 0.0003, "damping": 0.01},
    "eva": {"lr": 0.1, "damping": 0.03, "kl_clip": 1e-3},
    "exact_fisher": {"lr": 0.1, "damping": 0.1},
    "hessian_free": {"lr": 0.3, "damping": 0.1},
    "block_hessian_free": {"lr": 0.3, "damping": 0.1},
    "adam": {"lr": 0.001},
    "sgd": {"lr": 0.03, "momentum": 0.9},
}

register(
    TrainingProblem(
        name="cifar10-subset-cnn",
        summary="8,068 CIFAR-10 pictures; strided convolutions 3-32-64-64 and Linear, ReLU",
        model=lambda: strided_cnn((3, 32, 64, 64), 32),
        loss=cross_entropy,
        likelihood="categorical",
        data=data.cifar10_subset,
        batch_size=128,
        epochs=10,
        measure_damping=0.1,
        optimizers=SETTINGS,
    )
)

register(
    TrainingProblem(
        name="cifar10-subset-cnn-small",
        summary="600 made-up pictures in CIFAR-10's shape; 3-8-8-8 and Linear, ReLU; for tests",
        model=lambda: strided_cnn((3, 8, 8, 8), 32),
        loss=cross_entropy,
        likelihood="categorical",
        data=data.made_up_pictures,
        batch_size=50,
        epochs=5,
        measure_damping=0.1,
        optimizers=SETTINGS,
    )
)
