"""Autoencoders: the digits default that needs no download, and the papers' MNIST ones."""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from .. import data
from . import TrainingProblem, _hyper, register


def summed_logistic_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Logistic loss summed over the pixels, averaged over the batch (arXiv:2006.08877).

    The negative log-likelihood of independent Bernoulli pixels; targets in [0, 1].
    """
    return binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(logits)


def summed_squared_error(output: Tensor, targets: Tensor) -> Tensor:
    """½ ‖targets − output‖² summed over the pixels, averaged over the batch.

    The negative log-likelihood, less a constant, of independent Gaussian pixels of variance 1.
    """
    return (output - targets).square().sum() / (2 * len(output))


grey_pixels = partial(TrainingProblem, loss=summed_logistic_loss, likelihood="bernoulli")
real_pixels = partial(TrainingProblem, loss=summed_squared_error, likelihood="gaussian")


def autoencoder(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """Mirror-symmetric Linear layers; the code (the narrowest) and the output are linear."""
    code = min(sizes)
    layers: list[nn.Module] = []
    for place, (inward, outward) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inward, outward))
        if outward != code and place < len(sizes) - 2:
            layers.append(activation())
    return nn.Sequential(*layers)


def encoder_and_decoder(sizes: Sequence[int], activation: type[nn.Module]) -> nn.Sequential:
    """The layers of `autoencoder` as two children: "encoder" up to the code, then "decoder"."""
    layers = list(autoencoder(sizes, activation))
    widths = [
        layer.out_features if isinstance(layer, nn.Linear) else max(sizes) for layer in layers
    ]
    end = widths.index(min(sizes)) + 1
    parts = {"encoder": nn.Sequential(*layers[:end]), "decoder": nn.Sequential(*layers[end:])}
    return nn.Sequential(OrderedDict(parts))


DIGITS = _hyper.SETTINGS["digits-autoencoder"]

register(
    grey_pixels(
        name="digits-autoencoder",
        summary="1,797 real 8x8 digits of scikit-learn, 64-48-24-8-24-48-64, tanh; no download",
        model=lambda: autoencoder((64, 48, 24, 8, 24, 48, 64), nn.Tanh),
        data=data.digits,
        batch_size=150,
        epochs=60,
        measure_damping=0.1,
        optimizers=DIGITS,
    ),
    summary="the same digits, 64-20-10-4-10-20-64, tanh; runs in seconds, for tests",
    model=lambda: autoencoder((64, 20, 10, 4, 10, 20, 64), nn.Tanh),
    data=data.digits,
)

MNIST = _hyper.SETTINGS["mnist-autoencoder"]

register(
    grey_pixels(
        name="mnist-autoencoder",
        summary="MNIST 28x28, 784-1000-500-250-30-250-500-1000-784, ReLU; K-BFGS paper",
        model=lambda: autoencoder((784, 1000, 500, 250, 30, 250, 500, 1000, 784), nn.ReLU),
        data=data.mnist,
        batch_size=1000,
        epochs=20,
        measure_damping=0.3,
        optimizers=MNIST,
        searched=_hyper.AUTOENCODERS,
        sources={
            "kbfgs": _hyper.KBFGS_DEMO,
            "kbfgs_l": f"{_hyper.TENGRAD_CODE}; weight decay as in the demo of arXiv:2006.08877",
            "kfac": _hyper.KBFGS_DEMO,
            "shampoo": _hyper.TNT_DEMO,
            "tnt": _hyper.TNT_DEMO,
            "eva": _hyper.EVA_CODE,
            "adam": f"{_hyper.TNT_DEMO}, whose Adam squares the momentum",
            "sgd": _hyper.TNT_DEMO,
        },
    ),
    summary="scikit-learn's 8x8 digits, 64-20-10-4-10-20-64, ReLU; runs in seconds, for tests",
    model=lambda: autoencoder((64, 20, 10, 4, 10, 20, 64), nn.ReLU),
    data=data.digits,
    measure_damping=0.1,
    optimizers=DIGITS | {"tkfac": {"lr": 0.03, "damping": 0.01}},
)

HALVES = (("encoder",), ("decoder",))  # the blocks of arXiv:1712.07296

register(
    real_pixels(
        name="mnist-autoencoder-tanh",
        summary="MNIST 28x28, 784-1000-500-250-30-250-500-1000-784, tanh; Hessian-free papers",
        model=lambda: encoder_and_decoder((784, 1000, 500, 250, 30, 250, 500, 1000, 784), nn.Tanh),
        data=data.mnist,
        batch_size=1000,
        epochs=20,
        measure_damping=0.3,
        optimizers=_hyper.SETTINGS["mnist-autoencoder-tanh"],
        partition=HALVES,
    ),
    summary="scikit-learn's 8x8 digits, 64-20-10-4-10-20-64, tanh; runs in seconds, for tests",
    model=lambda: encoder_and_decoder((64, 20, 10, 4, 10, 20, 64), nn.Tanh),
    data=data.digits,
    measure_damping=0.1,
    optimizers=_hyper.SETTINGS["mnist-autoencoder-tanh-small"],
)
