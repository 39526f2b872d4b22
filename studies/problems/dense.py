"""Classifiers of Linear layers: the network small enough for exact curvature of KFAC's paper."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from .. import data
from . import _hyper, classifier, register


def tanh_network(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for inward, outward in pairwise(sizes):
        layers += [nn.Linear(inward, outward), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


SETTINGS = _hyper.SETTINGS["mnist16-tanh"]

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
