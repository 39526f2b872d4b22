"""Residual classifiers without norms: a small one on CIFAR-10, and one of seconds for tests."""

from typing import Any

from torch.nn.functional import cross_entropy

from studies import data
from studies.networks import norm_free_resnet
from studies.problems import TrainingProblem, register

SETTINGS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.003},
    "sgd": {"lr": 0.03, "momentum": 0.9},
    "hessian_free": {"lr": 0.3, "damping": 0.1},
    "block_hessian_free": {"lr": 0.3, "damping": 0.1},
}

BLOCKS = (("stem", "block1"), ("block2",), ("block3", "head"))  # as in arXiv:1712.07296

register(
    TrainingProblem(
        name="cifar10-small-resnet",
        summary="CIFAR-10; convolution, three residual blocks 16-32-64 without norms, ReLU",
        model=lambda: norm_free_resnet((16, 32, 64)),
        loss=cross_entropy,
        likelihood="categorical",
        data=data.cifar10,
        batch_size=1000,
        epochs=10,
        measure_damping=0.1,
        optimizers=SETTINGS,
        partition=BLOCKS,
        averaging=0.99,
    )
)

register(
    TrainingProblem(
        name="cifar10-small-resnet-small",
        summary="600 made-up pictures in CIFAR-10's shape; the same with 4-8-16; for tests",
        model=lambda: norm_free_resnet((4, 8, 16)),
        loss=cross_entropy,
        likelihood="categorical",
        data=data.made_up_pictures,
        batch_size=200,
        epochs=30,
        measure_damping=0.1,
        optimizers=SETTINGS,
        partition=BLOCKS,
        averaging=0.9,
    )
)
