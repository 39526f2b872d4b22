"""Small convolutional classifiers without norms."""

from functools import partial
from typing import Any

from .. import data
from . import _hyper, classifier, register
from ._networks import pooled_cnn, strided_cnn

SETTINGS = _hyper.SETTINGS["small-convolutional"]

# of small twins on made-up pictures: with these settings no optimizer diverges on any of them
MADE_UP: dict[str, Any] = {"batch_size": 50, "epochs": 5, "searched": {}}
MADE_UP["optimizers"] = SETTINGS | {
    "tnt": {"lr": 3e-5, "damping": 0.01},
    "hessian_free": {"lr": 0.1, "damping": 0.3},
    "block_hessian_free": {"lr": 0.1, "damping": 0.3},
    "adam": {"lr": 0.01},
}
SCHEDULED = MADE_UP | {"schedule": {"sgd": _hyper.Schedule(5, (3, 4))}}
MOVED = SCHEDULED | {"augment": partial(data.crop_and_flip, padding=1)}

register(
    classifier(
        name="cifar10-subset-cnn",
        summary="8,068 CIFAR-10 pictures; strided convolutions 3-32-64-64 and Linear, ReLU",
        model=lambda: strided_cnn((3, 32, 64, 64), 32),
        data=data.cifar10_subset,
        batch_size=128,
        epochs=10,
        measure_damping=0.1,
        optimizers=SETTINGS,
    ),
    summary="600 made-up pictures in CIFAR-10's shape; 3-8-8-8 and Linear, ReLU; for tests",
    model=lambda: strided_cnn((3, 8, 8, 8), 32),
    data=data.made_up_pictures,
    batch_size=50,
    epochs=5,
)

register(
    classifier(
        name="fashion-cnn",
        summary="Fashion-MNIST 28x28; 5x5 convolutions 1-32-64 with pooling, 3136-1024-10, ReLU",
        model=lambda: pooled_cnn((1, 32, 64), 1024, 28),
        data=data.fashion_mnist_pictures,
        batch_size=256,
        epochs=20,
        measure_damping=0.1,
        optimizers=SETTINGS,
        searched={
            "kbfgs_l": _hyper.Searched(
                {
                    "lr": _hyper.half_decades(1e-3, 0.3),
                    "damping": _hyper.half_decades(1e-3, 0.3),
                    "weight_decay": (1e-3, 3e-3, 0.01, 0.03),
                },
                f"{_hyper.TENGRAD_CODE}, a network of its own on Fashion-MNIST",
            )
        },
    ),
    summary="300 made-up grey pictures of 8x8; the same with 1-4-8 and 32-16-10; for tests",
    model=lambda: pooled_cnn((1, 4, 8), 16, 8),
    data=partial(data.made_up_pictures, 200, 100, size=8, channels=1),
    **MADE_UP,
)
