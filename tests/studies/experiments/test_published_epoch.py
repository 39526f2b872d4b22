"""The first epoch of the published MNIST trainings, on the real files."""

import os
from pathlib import Path

import pytest
import torch

from kronscope.studies import problems
from kronscope.studies.experiments import _published as published
from kronscope.studies.training import loop as training


@pytest.fixture
def _float32():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(before)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(os.environ.get("KRONSCOPE_DATA", "/nowhere"), "mnist").is_dir(),
    reason="needs the real files in $KRONSCOPE_DATA/mnist",
)
@pytest.mark.usefixtures("_float32")
# K-BFGS with a seed that does not diverge, and with one that does but for the limit
@pytest.mark.parametrize(
    ("name", "curve", "seed", "band"),
    [("kfac", "kfac", 0, 0.05), ("kbfgs", "kbfgs", 1, 0.06), ("kbfgs_limited", "kbfgs", 0, 0.1)],
)
def test_the_first_epoch_follows_the_published_curve(name, curve, seed, band):
    problem = problems.get("mnist-autoencoder")
    *_, state = training.steps(training.Settings(problem, name, epochs=1, seed=seed))
    assert state.step == 60
    loss = training.evaluate(state, problem)["train_loss"]
    expected = published.curves("mnist-autoencoder")[curve].train_loss[0]
    assert loss == pytest.approx(expected, rel=band)
