"""The papers' other autoencoders: Fashion-MNIST, CURVES and FACES.

Nothing published is known of their best hyper-parameters; those here are ours, MNIST's as a start.
"""

from torch import nn

from .. import data
from . import _hyper, register
from .autoencoders import DIGITS, MNIST, autoencoder, grey_pixels, real_pixels

register(
    grey_pixels(
        name="fashion-autoencoder",
        summary="Fashion-MNIST 28x28, 784-1000-500-250-30-250-500-1000-784, ReLU",
        model=lambda: autoencoder((784, 1000, 500, 250, 30, 250, 500, 1000, 784), nn.ReLU),
        data=data.fashion_mnist,
        batch_size=1000,
        epochs=20,
        measure_damping=0.3,
        optimizers=MNIST,
        searched=_hyper.AUTOENCODERS,
    ),
    summary="scikit-learn's 8x8 digits, 64-24-12-6-12-24-64, ReLU; runs in seconds, for tests",
    model=lambda: autoencoder((64, 24, 12, 6, 12, 24, 64), nn.ReLU),
    data=data.digits,
    measure_damping=0.1,
    optimizers=DIGITS,
)

CURVES = _hyper.SETTINGS["curves-autoencoder"]
CURVES_SIZES = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)

register(
    grey_pixels(
        name="curves-autoencoder",
        summary="CURVES 28x28, 784-400-200-100-50-25-6-25-50-100-200-400-784, ReLU; K-BFGS paper",
        model=lambda: autoencoder(CURVES_SIZES, nn.ReLU),
        data=data.curves,
        batch_size=1000,
        epochs=60,
        measure_damping=0.3,
        optimizers=CURVES,
        searched=_hyper.AUTOENCODERS,
    ),
    summary="500 curves, 784-24-12-6-12-24-784, ReLU; runs in seconds, for tests",
    model=lambda: autoencoder((784, 24, 12, 6, 12, 24, 784), nn.ReLU),
    data=data.few_curves,
    batch_size=100,
    optimizers=CURVES | {"adam": {"lr": 0.003}},
)

# Half the squared error summed over the pixels, as the papers train with: times 2/625 it is the
# mean over pixels. The data's variance averages 1, so that outputs of zero have a loss of 312.5.
register(
    real_pixels(
        name="faces-autoencoder",
        summary="FACES 25x25, 625-2000-1000-500-30-500-1000-2000-625, ReLU; K-BFGS paper",
        model=lambda: autoencoder((625, 2000, 1000, 500, 30, 500, 1000, 2000, 625), nn.ReLU),
        data=data.faces,
        batch_size=1000,
        epochs=20,
        measure_damping=0.3,
        optimizers=MNIST,
        searched=_hyper.AUTOENCODERS,
    ),
    summary="scikit-learn's 8x8 digits scaled like FACES, 64-32-16-6-16-32-64, ReLU; for tests",
    model=lambda: autoencoder((64, 32, 16, 6, 16, 32, 64), nn.ReLU),
    data=data.digits_standardised,
    optimizers=DIGITS | {"kfac": {"lr": 1.0, "damping": 1.0}},
)
