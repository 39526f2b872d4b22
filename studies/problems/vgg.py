"""VGG: sixteen layers on CIFAR-100, with batch norm and without, and eleven on SVHN."""

from functools import partial

from .. import data
from . import _hyper, classifier, register
from ._networks import VGG11, VGG16, vgg
from .convolutional import MOVED, SCHEDULED
from .residual import WITH_NORM

WITHOUT_NORM = _hyper.SETTINGS["vgg-norm-free"]
EVA = f"{_hyper.EVA_CODE}; weight decay ours"

shared = partial(
    classifier,
    batch_size=128,
    epochs=100,
    measure_damping=0.1,
    schedule=_hyper.CIFAR_SCHEDULES,
    searched=_hyper.CONVOLUTIONAL,
    initialisation=_hyper.VGG,
)
cifar100 = partial(
    shared,
    data=data.cifar100,
    augment=partial(data.crop_and_flip, fill=data.black(data.CIFAR100_MEAN, data.CIFAR100_STD)),
)
few = MOVED | {"data": partial(data.made_up_pictures, 200, 100, size=8, classes=20)}

register(
    cifar100(
        name="cifar100-vgg16",
        summary="CIFAR-100, cropped and mirrored; VGG16 with batch norm, 512-4096-4096-100, ReLU",
        model=lambda: vgg(VGG16, classes=100),
        optimizers=WITH_NORM,
        sources={
            "kbfgs_l": f"{_hyper.TENGRAD_CODE}, on CIFAR-10, where momentum sums the steps: "
            "lr 0.03 there is 0.3 here; update_every ours",
            "exact_fisher": f"{_hyper.TENGRAD_CODE}, on CIFAR-10, empirical Fisher; the weight "
            "decay ours",
            "eva": EVA,
        },
    ),
    summary="300 made-up pictures of 8x8, 20 classes; VGG 4-8-8-8-8, batch norm; for tests",
    model=lambda: vgg(((4,), (8, 8), (8, 8)), classes=20, hidden=(16, 16)),
    **few,
)

register(
    cifar100(
        name="cifar100-vgg16-norm-free",
        summary="CIFAR-100, cropped and mirrored; VGG16 without norms, 512-4096-4096-100, ReLU",
        model=lambda: vgg(VGG16, classes=100, norm=False),
        optimizers=WITHOUT_NORM,
        sources={"eva": EVA},
    ),
    summary="300 made-up pictures of 8x8, 20 classes; VGG 4-8-8-8-8 without norms; for tests",
    model=lambda: vgg(((4,), (8, 8), (8, 8)), classes=20, hidden=(16, 16), norm=False),
    **few,
)

register(
    shared(
        name="svhn-vgg11",
        summary="SVHN's digits; VGG11 without norms, 512-4096-4096-10, ReLU; MBF paper",
        model=lambda: vgg(VGG11, norm=False),
        data=data.svhn,
        optimizers=WITHOUT_NORM,
        sources={"eva": EVA},
    ),
    summary="300 made-up pictures of 8x8; VGG 4-8-8-8 without norms, ReLU; for tests",
    model=lambda: vgg(((4,), (8,), (8, 8)), hidden=(16, 16), norm=False),
    data=partial(data.made_up_pictures, 200, 100, size=8),
    **SCHEDULED,
)
