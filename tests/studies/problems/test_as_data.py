"""What a problem says of itself as data: complete for every optimizer, and true of its network."""

import pytest
from torch import nn

from kronscope.optim.capture.likelihoods import LIKELIHOODS
from kronscope.studies import problems
from kronscope.studies.problems import _hyper as hyper
from kronscope.studies.training.optimizers import WRAPPED

PROBLEMS = problems.PROBLEMS
SMALL = {name: p for name, p in PROBLEMS.items() if name.endswith("-small")}


@pytest.mark.parametrize("name", PROBLEMS)
def test_everything_is_there_as_data_for_every_optimizer(name):
    """Likelihood, loss, batch, initialisation, augmentation, schedule, recommended and searched."""
    problem = PROBLEMS[name]
    assert problem.likelihood in LIKELIHOODS
    assert callable(problem.loss)
    assert callable(problem.augment) or problem.augment is None
    assert problem.initialisation
    assert min(problem.batch_size, problem.epochs) > 0
    assert problem.optimizers
    assert set(problem.searched) == set(problem.optimizers) >= set(problem.schedule)
    for optimizer, recommended in problem.optimizers.items():
        assert recommended["damping" if optimizer in WRAPPED else "lr"] > 0
        assert problem.epochs_of(optimizer) > 0
        searched = problem.searched[optimizer]
        if searched.source == hyper.OPEN:  # around what is recommended, as `tune grid` does
            assert all(recommended[option] in values for option, values in searched.grid.items())
            expected = {"kl_clip" if "kl_clip" in recommended else "lr", "damping"}
            assert set(searched.grid) == expected & set(recommended)


def test_what_is_not_known_of_the_papers_is_ours():
    """MBF's grids, and all of what the tanh, recurrent and residual papers searched."""
    for problem in PROBLEMS.values():
        assert problem.searched.get("mbf", hyper.ours({})).source == hyper.OPEN
    for name in ("mnist16-tanh", "sequential-mnist-lstm", "cifar10-small-resnet"):
        assert {s.source for s in PROBLEMS[name].searched.values()} == {hyper.OPEN}
    assert {s.source == hyper.OPEN for s in PROBLEMS["fashion-cnn"].searched.values()} == {0, 1}


def uniform(layer):
    return 1 / (3 * layer.weight[0].numel()) ** 0.5


def kaiming(layer):
    return (2 / layer.weight[0].numel()) ** 0.5


def vgg(layer):
    return uniform(layer) if isinstance(layer, nn.Linear) else (2 / (9 * len(layer.weight))) ** 0.5


BEGINNINGS = {  # deviation of the weights of a layer that is no second one of a block
    hyper.PYTORCH: uniform,
    hyper.KAIMING: kaiming,
    hyper.VGG: vgg,
    hyper.NORM_FREE: lambda m: uniform(m) if isinstance(m, nn.Linear) else kaiming(m),
    hyper.LSTM: uniform,
}


@pytest.mark.parametrize("name", SMALL)
def test_networks_begin_as_is_said(name):
    problem = SMALL[name]
    assert problem.initialisation == PROBLEMS[name.removesuffix("-small")].initialisation
    model, blocks = problem.model(), 3
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.numel() >= 60:
            expected = BEGINNINGS[problem.initialisation](layer)
            if problem.initialisation == hyper.NORM_FREE and path.endswith("conv2"):
                expected /= (2 * blocks) ** 0.5
            # the deviation of 60 draws is known to 9 %
            assert layer.weight.std().item() == pytest.approx(expected, rel=0.35), path
            zero = isinstance(layer, nn.Conv2d) and "biases zero" in problem.initialisation
            assert layer.bias is None or (layer.bias.abs().max() == 0) == zero, path
