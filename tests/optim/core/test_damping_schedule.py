"""Damping: a scheduler does to the damping what it does to a learning rate."""

import io
import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

from kronscope.optim import KFAC
from kronscope.optim.core.damping_schedule import Damping
from kronscope.optim.methods.layerwise.layerwise_step import LayerwiseStep


class Damped(torch.optim.Optimizer):
    """Gradient descent that carries a damping."""

    def __init__(self, params, lr=0.1, damping=1.0):
        super().__init__(params, {"lr": lr, "damping": damping})

    def step(self, closure=None):  # noqa: ARG002
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"] / (1 + group["damping"]))


def groups(**settings):
    """Two parameters with gradients, in groups with settings of their own."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    for p in parameters:
        p.grad = torch.ones(2)
    return [
        {"params": [p], **{key: pair[i] for key, pair in settings.items()}}
        for i, p in enumerate(parameters)
    ]


def halves(epoch):
    return 0.5**epoch


def sequential(opt):
    parts = [schedulers.LinearLR(opt, 0.2, total_iters=4), schedulers.ExponentialLR(opt, 0.7)]
    return schedulers.SequentialLR(opt, parts, milestones=[4])


def chained(opt):
    return schedulers.ChainedScheduler(
        [schedulers.ConstantLR(opt, 0.5, 3), schedulers.ExponentialLR(opt, 0.9)], opt
    )


SCHEDULERS = {
    "LambdaLR": lambda opt: schedulers.LambdaLR(opt, halves),
    "MultiplicativeLR": lambda opt: schedulers.MultiplicativeLR(opt, lambda _: 0.9),
    "StepLR": lambda opt: schedulers.StepLR(opt, 3, gamma=0.5),
    "MultiStepLR": lambda opt: schedulers.MultiStepLR(opt, [2, 5]),
    "ConstantLR": lambda opt: schedulers.ConstantLR(opt, 0.25, 4),
    "LinearLR": lambda opt: schedulers.LinearLR(opt, 0.1, total_iters=6),
    "ExponentialLR": lambda opt: schedulers.ExponentialLR(opt, 0.8),
    "PolynomialLR": lambda opt: schedulers.PolynomialLR(opt, 20, 2.0),
    "CosineAnnealingLR": lambda opt: schedulers.CosineAnnealingLR(opt, T_max=12, eta_min=1e-3),
    "CosineAnnealingWarmRestarts": lambda opt: schedulers.CosineAnnealingWarmRestarts(opt, 4),
    "CyclicLR": lambda opt: schedulers.CyclicLR(opt, 0.1, 2.0, 3, cycle_momentum=False),
    "OneCycleLR": lambda opt: schedulers.OneCycleLR(opt, 3.0, 30, cycle_momentum=False),
    "ReduceLROnPlateau": lambda opt: schedulers.ReduceLROnPlateau(opt, patience=1),
    "SequentialLR": sequential,
    "ChainedScheduler": chained,
    "SWALR": lambda opt: SWALR(opt, 0.05, anneal_epochs=6),
}
every = pytest.mark.parametrize("name", sorted(SCHEDULERS))


def advance(opt, scheduler, count=10):
    """Step both; the values of lr and damping after each."""
    seen = []
    for _ in range(count):
        opt.step()
        plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
        scheduler.step(*([1.0] if plateau else []))
        seen.append([(g["lr"], g.get("damping")) for g in opt.param_groups])
    return seen


def test_every_scheduler_of_torch_has_a_case():
    names = set(schedulers.__all__) - {"LRScheduler"}
    assert names <= set(SCHEDULERS)
    assert len(names) >= 15


@every
def test_the_damping_goes_as_a_learning_rate_would(name):
    values = (2.0, 0.7)
    rates = torch.optim.SGD(groups(lr=values))
    expected = [[lr for lr, _ in row] for row in advance(rates, SCHEDULERS[name](rates))]
    assert len({row[0] for row in expected}) > 1
    opt = Damped(groups(damping=values), lr=0.3)
    scheduler = SCHEDULERS[name](Damping(opt))
    found = advance(opt, scheduler)
    assert [[damping for _, damping in row] for row in found] == expected
    assert {lr for row in found for lr, _ in row} == {0.3}
    assert scheduler.get_last_lr() == expected[-1]


@every
def test_beside_a_scheduler_of_the_learning_rate(name):
    opt = Damped(groups(damping=(2.0, 0.7), lr=(0.4, 0.1)))
    alone = Damped(groups(damping=(2.0, 0.7), lr=(0.4, 0.1)))
    both = SCHEDULERS[name](opt), SCHEDULERS[name](Damping(opt))
    expected_lr = advance(alone, SCHEDULERS[name](alone))
    again = Damped(groups(damping=(2.0, 0.7), lr=(0.4, 0.1)))
    expected_damping = advance(again, SCHEDULERS[name](Damping(again)))
    for lr_row, damping_row in zip(expected_lr, expected_damping, strict=True):
        opt.step()
        for scheduler in both:
            plateau = isinstance(scheduler, schedulers.ReduceLROnPlateau)
            scheduler.step(*([1.0] if plateau else []))
        found = [(g["lr"], g["damping"]) for g in opt.param_groups]
        wanted = [(a[0], b[1]) for a, b in zip(lr_row, damping_row, strict=True)]
        assert found == wanted


@every
@pytest.mark.parametrize("phase", [0, 1, 5])
def test_resume(name, phase):
    def start():
        opt = Damped(groups(damping=(2.0, 0.7)))
        return opt, SCHEDULERS[name](Damping(opt))

    opt, scheduler = start()
    advance(opt, scheduler, phase)
    if name in ("LambdaLR", "MultiplicativeLR"):
        saved = opt.state_dict(), scheduler.state_dict()  # functions are not for torch.load
    else:
        buffer = io.BytesIO()
        torch.save((opt.state_dict(), scheduler.state_dict()), buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=False)
    expected = advance(opt, scheduler)
    resumed, other = start()
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    assert advance(resumed, other) == expected


def test_resume_by_last_epoch():
    """The value the schedule started from is in the optimizer's checkpoint."""
    opt = Damped(groups(damping=(2.0, 0.7)))
    advance(opt, schedulers.CosineAnnealingLR(Damping(opt), 12), 5)
    resumed = Damped(groups(damping=(9.0, 9.0)))
    resumed.load_state_dict(opt.state_dict())
    other = schedulers.LambdaLR(Damping(resumed), halves, last_epoch=1)
    assert other.base_lrs == [2.0, 0.7]
    assert [g["damping"] for g in resumed.param_groups] == [0.5, 0.175]


def test_warning_if_the_optimizer_has_not_stepped():
    opt = Damped(groups(damping=(2.0, 0.7)))
    scheduler = schedulers.StepLR(Damping(opt), 1)
    with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
        scheduler.step()
    late = Damped(groups(damping=(2.0, 0.7)))
    scheduler = schedulers.StepLR(Damping(late), 1)
    late.step()
    scheduler.step()  # warnings are errors here


def problem():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), torch.randn(8, 3)

    def closure(opt):
        opt.zero_grad()
        loss = model(x).sub(1).square().sum(1).mean()
        loss.backward()
        return loss

    return model, closure


def test_the_optimizer_uses_it():
    """Inverses made after the scheduler's step have its damping."""
    model, closure = problem()
    opt = KFAC(model, damping=4.0, likelihood="gaussian", refresh_every=1)
    scheduler = schedulers.ExponentialLR(Damping(opt), 0.25)
    for k in range(3):
        opt.step(lambda: closure(opt))
        for layer in (model[0], model[2]):
            state, root = opt.state[layer.weight], math.sqrt(4.0 * 0.25**k)
            A, G = state["A"], state["G"]
            for inverse, factor in (("A_inv", A), ("G_inv", G)):
                expected = torch.linalg.inv(factor + root * torch.eye(len(factor)))
                torch.testing.assert_close(state[inverse], expected)
        scheduler.step()


def test_inside_a_wrapper():
    model, closure = problem()
    opt = LayerwiseStep(KFAC(model, damping=4.0, likelihood="gaussian"), model)
    inner, outer = (schedulers.StepLR(Damping(one), 2, 0.5) for one in (opt.optimizer, opt))
    dampings = []
    for _ in range(4):
        opt.step(lambda: closure(opt))
        inner.step()
        outer.step()
        dampings.append(opt.optimizer.param_groups[0]["damping"])
    assert dampings == [4.0, 1.0, 1.0, 0.25]  # halved by each of the two


def test_a_damping_that_reaches_zero_is_refused_at_the_next_step():
    opt = Damped(groups(damping=(2.0, 0.7)))
    scheduler = schedulers.CosineAnnealingLR(Damping(opt), T_max=3)
    advance(opt, scheduler, 3)  # to the end of the schedule and no further
    with pytest.raises(ValueError, match=r"group 0 is 0.0, .*eta_min"):
        opt.step()


def test_the_view_reads_like_a_group():
    opt = Damped(groups(damping=(2.0, 0.7)))
    schedulers.ConstantLR(opt, 0.5)
    (group, _) = Damping(opt).param_groups
    assert dict(group) == {"params": opt.param_groups[0]["params"], "lr": 2.0}
    assert len(group) == 2
    assert "initial_lr" not in group
    group["initial_lr"] = 3.0
    assert opt.param_groups[0]["initial_damping"] == 3.0
    assert opt.param_groups[0]["initial_lr"] == 0.1
    del group["initial_lr"]
    assert set(opt.param_groups[0]) == {"params", "lr", "damping", "initial_lr"}


def test_errors():
    sgd = torch.optim.SGD(groups(lr=(1.0, 1.0)))
    with pytest.raises(ValueError, match=r"SGD has no 'damping' in its param_groups; .*'momentum'"):
        Damping(sgd)
    with pytest.raises(TypeError, match="views an optimizer, got Linear"):
        Damping(nn.Linear(1, 1))
    view = Damping(Damped(groups(damping=(1.0, 2.0))))
    with pytest.raises(ValueError, match="cycle_momentum"):
        schedulers.OneCycleLR(view, 1.0, 10)
    with pytest.raises(TypeError, match="no state to load"):
        view.load_state_dict(view.state_dict())
