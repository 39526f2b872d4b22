"""All-CNN-C on CIFAR-10: as the papers of curvature train it, and with dropout as its own paper."""

from functools import partial

from .. import data
from . import _hyper, classifier, register
from ._networks import all_cnn
from .convolutional import MOVED

SETTINGS = _hyper.SETTINGS["cifar10-allcnn"]
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
