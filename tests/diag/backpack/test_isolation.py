"""The BackPACK engine leaves no trace: not in models, random states, contexts or defaults."""

import copy
import warnings

import pytest
import torch
import torch._dynamo  # imports sympy, which adds warning filters of its own
from backpack import backpack, extend, extensions
from backpack.context import CTX
from torch import nn

from kronscope.diag import Problem, dense, exact
from kronscope.diag.backpack import quantities as crosscheck
from kronscope.diag.problem.copies import hook_free_copy

LOSS = nn.CrossEntropyLoss()


def problem_of(model, x):
    return Problem(model.eval(), LOSS, x, torch.tensor([0, 2, 1, 2]))


def state(model):
    return {
        "values": copy.deepcopy(model.state_dict()),
        "grads": {n: p.grad for n, p in model.named_parameters()},
        "trainable": [p.requires_grad for p in model.parameters()],
        "attributes": [sorted(vars(p)) for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        "mode": model.training,
    }


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails):
    act = nn.GELU() if fails else nn.Tanh()
    model = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 3))
    problem = problem_of(model, torch.randn(4, 4))
    model.train()
    before, inside = state(model), state(problem.model)
    random, dtype, handles = torch.get_rng_state(), torch.get_default_dtype(), len(CTX.hook_handles)
    filters = list(warnings.filters)
    for compute in (crosscheck.ggn, crosscheck.fisher_mc, crosscheck.diag_hessian, crosscheck.kfra):
        if fails:
            with pytest.raises(ValueError, match="GELU"):
                compute(problem, problem.block("0"))
        else:
            compute(problem, problem.block("0"))
    assert str(state(model)) == str(before)
    assert str(state(problem.model)) == str(inside)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_default_dtype() == dtype
    assert len(CTX.hook_handles) == handles
    assert warnings.filters == filters
    assert CTX.get_active_exts() == ()


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 2, num_layers=2, batch_first=True)
        self.flatten, self.last = nn.Flatten(), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.flatten(self.lstm(x)[0]))


def test_the_converter_leaves_the_random_state_alone():
    """It makes new recurrent layers, which draw their weights before they get the old ones."""
    problem = problem_of(Recurrent(), torch.randn(4, 4, 2))
    random = torch.get_rng_state()
    crosscheck.diag_ggn(problem, problem.block("last"))
    assert torch.equal(torch.get_rng_state(), random)


def test_the_callers_own_backpack():
    """A model that was extended before, inside a context, without gradients."""
    model = extend(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    problem = problem_of(model, torch.randn(4, 4))
    mine = extensions.BatchGrad()
    with backpack(mine), torch.no_grad():
        found = crosscheck.ggn(problem, problem.block("0"))
        assert CTX.get_active_exts() == (mine,)
    torch.testing.assert_close(dense(found), dense(exact.ggn(problem, problem.block("0"))))
    with warnings.catch_warnings(), backpack(mine):
        warnings.filterwarnings("ignore", "Full backward hook is firing")
        LOSS(model(problem.inputs), problem.targets).backward()
    assert model[0].weight.grad_batch.shape == (4, 4, 4)
    assert not hasattr(hook_free_copy(model)[0].weight, "grad_batch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_dtypes(dtype, default):
    """BackPACK makes constants of the default dtype, which need not be the model's."""
    layers = [nn.Conv2d(1, 2, 2), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(2, 3)]
    x, t = torch.randn(4, 1, 3, 3), torch.randn(4, 3)
    problem = Problem(nn.Sequential(*layers), nn.MSELoss(), x, t, dtype=dtype)
    torch.set_default_dtype(default)
    try:
        for compute in (crosscheck.ggn, crosscheck.fisher_mc, crosscheck.kfra, crosscheck.kfac):
            assert dense(compute(problem, problem.block("0"))).dtype == dtype
        assert crosscheck.diag_hessian(problem, problem.block("0")).diagonal.dtype == dtype
        assert torch.get_default_dtype() == default
    finally:
        torch.set_default_dtype(torch.float64)
