"""All-CNN-C on CIFAR-10: as the papers of curvature train it, and with dropout as its own paper."""

from functools import partial
from typing import Any

from .. import data
from . import _hyper, classifier, register
from ._networks import all_cnn
from .convolutional import MOVED

EVERY = {"update_every": 10, "refresh_every": 100}  # the curvature papers' periods
DECAY = {"weight_decay": 5e-4}  # arXiv:2102.06737, in its published code
SETTINGS: dict[str, dict[str, Any]] = {
    "kbfgs": {"lr": 0.3, "damping": 0.3, **DECAY, "update_every": 20},
    "kbfgs_l": {"lr": 0.3, "damping": 0.3, "history": 100, **DECAY, "update_every": 20},
    "kfac": {"lr": 0.1, "damping": 0.03, **DECAY, **EVERY},
    "ekfac": {"lr": 0.1, "damping": 0.03, **DECAY, **EVERY},
    "tkfac": {"lr": 0.1, "damping": 0.03, **DECAY, **EVERY},
    "mbf": {"lr": 3e-4, "damping": 0.003, **EVERY},
    "shampoo": {"lr": 0.01, "damping": 0.01, **EVERY, "refresh_early": True},
    "tnt": {"lr": 1e-4, "damping": 0.01, **EVERY},
    "eva": {"lr": 0.1, "damping": 0.03, "kl_clip": 1e-3, **DECAY},
    "exact_fisher": {"lr": 0.1, "damping": 0.1, **DECAY},
    "layerwise_kfac": {"damping": 0.03, **DECAY, **EVERY},
    "hessian_free": {"lr": 0.3, "damping": 0.1},
    "block_hessian_free": {"lr": 0.3, "damping": 0.1},
    "adam": {"lr": 0.001},
    "sgd": {"lr": 0.03, "momentum": 0.9, **DECAY},
}
SPRINGENBERG = "recalled: arXiv:1412.6806"
EVA = f"{_hyper.EVA_CODE}; weight decay ours"

whole = partial(
    classifier,
    data=data.cifar10,
    batch_size=256,
    epochs=100,
    measure_damping=0.1,
    augment=partial(
        data.crop_and_flip, padding=5, fill=data.black(data.CIFAR_MEAN, data.CIFAR_STD)
    ),
    initialisation=_hyper.KAIMING,
)
few = MOVED | {
    "summary": "300 made-up pictures of 16x16, moved and mirrored; the same, 8 wide; for tests",
    "data": partial(data.made_up_pictures, 200, 100, size=16),
}

register(
    whole(
        name="cifar10-allcnn",
        summary="CIFAR-10, cropped and mirrored; All-CNN-C, nine convolutions, ReLU; K-BFGS paper",
        model=all_cnn,
        optimizers=SETTINGS,
        schedule=_hyper.CIFAR_SCHEDULES,
        searched=_hyper.CONVOLUTIONAL,
        sources={"eva": EVA},
    ),
    model=lambda: all_cnn(width=8),
    **few,
)

register(
    whole(
        name="cifar10-allcnn-dropout",
        summary="CIFAR-10, cropped and mirrored; All-CNN-C with dropout, as in its own paper",
        model=lambda: all_cnn(dropout=(0.2, 0.5)),
        # 350 epochs, rate and weight decay as Springenberg et al. had them
        optimizers=SETTINGS | {"sgd": {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.001}},
        schedule=_hyper.CIFAR_SCHEDULES
        | {"sgd": _hyper.Schedule(350, (200, 250, 300), source=SPRINGENBERG)},
        searched=_hyper.CONVOLUTIONAL
        | {"sgd": _hyper.Searched({"lr": (0.01, 0.05, 0.1, 0.25)}, SPRINGENBERG)},
        sources={"eva": EVA, "sgd": SPRINGENBERG},
    ),
    model=lambda: all_cnn(width=8, dropout=(0.2, 0.5)),
    **few,
)
