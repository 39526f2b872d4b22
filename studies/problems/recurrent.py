"""Recurrent classifiers: digits read pixel by pixel by three LSTM layers with peepholes."""

from .. import data
from . import _hyper, classifier, register
from ._lstm import SequenceClassifier

SETTINGS = _hyper.SETTINGS["sequential-mnist-lstm"]

LAYERS = (("lstm1",), ("lstm2",), ("lstm3", "head"))  # the blocks of arXiv:1712.07296

register(
    classifier(
        name="sequential-mnist-lstm",
        summary="MNIST pooled to 7x7, 49 steps of one pixel; three peephole LSTM layers of 10",
        model=lambda: SequenceClassifier(inputs=1, hidden=10, layers=3, classes=10),
        data=data.mnist_sequences,
        batch_size=1000,
        epochs=20,
        measure_damping=0.1,
        optimizers=SETTINGS,
        partition=LAYERS,
        initialisation=_hyper.LSTM,
    ),
    summary="scikit-learn's 8x8 digits pooled to 4x4, 16 steps; the same network; for tests",
    model=lambda: SequenceClassifier(inputs=1, hidden=10, layers=3, classes=10),
    data=data.digits_sequences,
    epochs=15,
)
