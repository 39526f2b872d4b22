"""Residual classifiers: ResNet32 with batch norm, a small one without norms; ones for tests."""

from functools import partial

from .. import data
from . import _hyper, classifier, register
from ._networks import norm_free_resnet, resnet, resnet32
from .convolutional import MOVED

SETTINGS = _hyper.SETTINGS["cifar10-small-resnet"]

BLOCKS = (("stem", "block1"), ("block2",), ("block3", "head"))  # as in arXiv:1712.07296

register(
    classifier(
        name="cifar10-small-resnet",
        summary="CIFAR-10; convolution, three residual blocks 16-32-64 without norms, ReLU",
        model=lambda: norm_free_resnet((16, 32, 64)),
        data=data.cifar10,
        batch_size=1000,
        epochs=10,
        measure_damping=0.1,
        optimizers=SETTINGS,
        partition=BLOCKS,
        averaging=0.99,
        initialisation=_hyper.NORM_FREE,
    ),
    summary="600 made-up pictures in CIFAR-10's shape; the same with 4-8-16; for tests",
    model=lambda: norm_free_resnet((4, 8, 16)),
    data=data.made_up_pictures,
    batch_size=200,
    epochs=30,
    averaging=0.9,
)

WITH_NORM = _hyper.SETTINGS["cifar10-resnet32"]

register(
    classifier(
        name="cifar10-resnet32",
        summary="CIFAR-10, cropped and mirrored; ResNet32 with batch norm, ReLU; TNT paper",
        model=resnet32,
        data=data.cifar10,
        batch_size=128,
        epochs=100,
        measure_damping=0.1,
        optimizers=WITH_NORM,
        initialisation=_hyper.KAIMING,
        augment=partial(data.crop_and_flip, fill=data.black(data.CIFAR_MEAN, data.CIFAR_STD)),
        schedule=_hyper.CIFAR_SCHEDULES,
        searched=_hyper.CONVOLUTIONAL,
        sources={
            "shampoo": _hyper.TNT_DEMO,
            "tnt": _hyper.TNT_DEMO,
            "eva": f"{_hyper.EVA_CODE}; weight decay ours",
            "sgd": f"{_hyper.TNT_DEMO}, where a weight decay of 0.01 multiplied the parameters; "
            "this one, of the loss, is a tenth of it, as momentum sums ten gradients",
        },
    ),
    summary="300 made-up pictures of 16x16, moved and mirrored; three blocks 4-8-16; for tests",
    model=lambda: resnet((4, 8, 16), depth=1),
    data=partial(data.made_up_pictures, 200, 100, size=16),
    **MOVED,
)
