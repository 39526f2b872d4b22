"""What is measured is a copy: of the data, of a model with hooks, of one that writes in place."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from kronscope.diag import Problem, approximations, dense, exact, metrics
from kronscope.diag.backpack.quantities import diag_ggn

OF = [*exact.TRUTHS]


def data(n=6):
    return torch.randn(n, 4), torch.randint(3, (n,))


def tail():
    return [nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)]


class Scaling(nn.Module):
    """Changes its input by hand."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*tail())

    def forward(self, x):
        x.mul_(0.5)
        return self.body(x)


class Careful(nn.Module):
    """The same without touching it."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x * 0.5)


def measure(problem, block):
    for of in OF:
        truth = exact.truth(problem, block, of)
        dense(truth)
    approximations.kbfgs(problem, block, steps=3)
    metrics.rho(truth, approximations.kfac(problem, block), 1.0, problem=problem, block=block)


@pytest.mark.parametrize("training", [True, False])
def test_a_model_that_writes_into_its_input(training):
    x, t = data()
    kept = x.clone()
    model = Scaling().train(training)
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    expected = Problem(Careful(model.body), nn.CrossEntropyLoss(), x, t)
    assert torch.equal(x, kept)
    for block in problem.blocks():
        own = expected.block(block.name)
        torch.testing.assert_close(problem.gradient(block), expected.gradient(own))
        measure(problem, block)
        for of in OF:
            found = dense(exact.truth(problem, block, of))
            torch.testing.assert_close(found, dense(exact.truth(expected, own, of)))
        by_backpack = exact.empirical_fisher(problem, block, backend="backpack")
        torch.testing.assert_close(dense(by_backpack), dense(exact.empirical_fisher(expected, own)))
    assert torch.equal(x, kept)
    assert torch.equal(problem.inputs, kept)


def test_a_first_module_in_place():
    x, t = data()
    kept = x.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), *tail())
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    measure(problem, problem.block("1"))
    assert torch.equal(x, kept)
    assert torch.equal(problem.inputs, kept)


def test_a_batch_that_is_filled_again():
    x, t = data()
    model = nn.Sequential(*tail())
    before, problem = (Problem(model, nn.CrossEntropyLoss(), x, t) for _ in range(2))
    expected = dense(exact.hessian(before, before.block("0")))
    x.zero_()
    t.zero_()
    assert torch.equal(dense(exact.hessian(problem, problem.block("0"))), expected)


@pytest.mark.parametrize("called", [True, False])
def test_pruning_is_refused_with_the_way_out(called):
    model = nn.Sequential(*tail())
    prune.random_unstructured(model[0], "weight", 0.3)
    x, t = data()
    if called:
        with torch.no_grad():
            model(x)
    with pytest.raises(ValueError, match=r"layer '0'.*RandomUnstructured.*prune\.remove"):
        Problem(model, nn.CrossEntropyLoss(), x, t)
    prune.remove(model[0], "weight")
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    twin = nn.Sequential(*tail())
    twin.load_state_dict(model.state_dict())
    expected = Problem(twin, nn.CrossEntropyLoss(), x, t)
    # the weight now stands behind the bias among the layer's parameters
    assert problem.blocks() == expected.blocks()
    approximations.kfac(problem, problem.block("0"))
    diag_ggn(problem, problem.block("0"))


class Keeping(nn.Module):
    """Stores what it returns, for somebody to look at."""

    def __init__(self, store):
        super().__init__()
        self.layer, self.store, self.last = nn.Linear(4, 3), store, None
        self.register_buffer("state", None, persistent=False)

    def forward(self, x):
        z = self.layer(x)
        if self.store == "attribute":
            self.last = z
        elif self.store == "list":
            self.last = [z]
        else:
            self.state = z
        return z


@pytest.mark.parametrize(
    ("store", "name"), [("attribute", "last"), ("list", "last"), ("buffer", "state")]
)
def test_what_cannot_be_copied_is_named(store, name):
    x, t = data()
    model = nn.Sequential(nn.Tanh(), Keeping(store))
    model(x)
    with pytest.raises(ValueError, match=rf"'{name}' of layer '1' \(Keeping\) cannot be copied"):
        Problem(model, nn.CrossEntropyLoss(), x, t)
    with torch.no_grad():
        model(x)
    Problem(model, nn.CrossEntropyLoss(), x, t)
    model = Keeping("attribute")
    model.file = open(__file__)  # noqa: SIM115
    with model.file, pytest.raises(ValueError, match="'file' of the module itself"):
        Problem(model, nn.CrossEntropyLoss(), x, t)


class Looking:
    """A hook as an optimizer registers it."""

    def __init__(self):
        self.seen = []

    def __call__(self, _m, _args, z):
        self.seen.append(z)


def test_hooks_are_noted_and_functions_among_them_warned_of():
    x, t = data()
    model = nn.Sequential(*tail())
    look = Looking()
    handle = model[0].register_forward_hook(look)
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    assert len(problem.notes) == 1
    assert "hooks of layer '0'" in problem.notes[0]
    handle.remove()
    handle = model[2].register_forward_hook(lambda _m, _args, z: 2 * z)
    with pytest.warns(UserWarning, match=r"hooks of layer '2' are left out"):
        problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    assert len(problem.notes) == 1
    handle.remove()
    model.register_forward_pre_hook(lambda _m, args: (2 * args[0],))
    with pytest.warns(UserWarning, match=r"hooks of the module itself are left out"):
        Problem(model, nn.CrossEntropyLoss(), x, t)
    assert look.seen == []  # no hook of the caller's is run
