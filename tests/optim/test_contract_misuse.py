"""What a user may do to an optimizer or its model that nobody planned: it works or is refused."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from kronscope.optim import (
    EKFAC,
    KBFGS,
    KFAC,
    KFAC2015,
    MBF,
    TKFAC,
    TNT,
    ExactFisher,
    HessianFree,
    LayerwiseStep,
    NumericalError,
)
from kronscope.optim.core import refresher as refresh
from tests.optim.cases import (
    MAKE,
    OF_PARAMETERS,
    each,
    is_sampled,
    make_for,
    same,
    state_of,
    weights,
)
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
LAYERED = sorted(set(MAKE) - OF_PARAMETERS)
of_layers = pytest.mark.parametrize("kind", each(LAYERED))
SAMPLING = [KFAC, EKFAC, TKFAC, TNT, ExactFisher]
X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def closure_of(opt, model, x=X):
    def closure():
        opt.zero_grad()
        loss = 0.5 * model(x.to(next(model.parameters()).dtype)).square().sum() / len(x)
        loss.backward()
        return loss.detach()

    return closure


def gaussian(kind):
    return {"likelihood": "gaussian"} if is_sampled(kind) else {}


COMPUTED = {
    "weight_norm": lambda m: parametrizations.weight_norm(m[0]),
    "weight_norm by hooks": lambda m: nn.utils.weight_norm(m[0]),
    "spectral_norm by hooks": lambda m: nn.utils.spectral_norm(m[0]),
    "pruned": lambda m: prune.random_unstructured(m[0], "weight", 0.5),
    "pruned bias": lambda m: prune.random_unstructured(m[0], "bias", 0.5),
}


@every
@pytest.mark.parametrize("how", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*torch.nn.utils.*is deprecated")
def test_a_weight_that_is_computed_is_trained_by_the_plain_rule(kind, how):
    model = net()
    COMPUTED[how](model)
    model(X)  # hooks put the computed weight in its place
    opt = MAKE[kind](model, **gaussian(kind))
    before = weights(model)
    if kind == "kfac-2015" and how == "spectral_norm by hooks":
        with pytest.raises(ValueError, match="the closure's two calls"):  # it moves in each call
            opt.step(closure_of(opt, model))
        return
    for _ in range(2):
        opt.step(closure_of(opt, model))
    assert torch.isfinite(weights(model)).all()
    assert not torch.equal(weights(model), before)
    if kind in LAYERED:
        assert ("0" in opt.preconditioner()) == (how == "pruned bias")
        assert how == "pruned bias" or "plain rule" in opt.summary()


@every
def test_a_first_group_that_is_frozen(kind):
    model = net()
    model[0].requires_grad_(False)
    own = [{"params": model[0].parameters(), "damping": 7.0}, {"params": model[2].parameters()}]
    opt = MAKE[kind](model, groups=own, **gaussian(kind))
    before = model[2].weight.clone()
    opt.step(closure_of(opt, model))
    assert not torch.equal(model[2].weight, before)


@of_layers
def test_a_weight_that_joins_without_its_bias(kind):
    model = net()
    model[0].requires_grad_(False)
    opt = MAKE[kind](model, **gaussian(kind))
    opt.step(closure_of(opt, model))
    model[0].requires_grad_(True)
    groups = len(opt.param_groups)
    with pytest.raises(ValueError, match="layer '0': only one of weight and bias is in a group"):
        opt.add_param_group({"params": [model[0].weight]})
    assert len(opt.param_groups) == groups
    opt.add_param_group({"params": model[0].parameters()})
    opt.step(closure_of(opt, model))
    assert "0" in opt.preconditioner()


@every
def test_a_strangers_parameter_cannot_join(kind):
    opt = MAKE[kind](net())
    with pytest.raises(ValueError, match="1 parameters of the groups are not in Sequential"):
        opt.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert len(opt.param_groups) == 1


def test_groups_that_are_not_as_torch_wants_them():
    model = net()
    with pytest.raises(ValueError, match=r"a group needs 'params', got \['lr'\]"):
        KFAC(model, groups=[{"lr": 0.1}])
    opt = KFAC(model, groups=[{"params": model[0].named_parameters(), "lr": 0.1}])
    assert opt.param_groups[1]["params"] == list(model[0].parameters())


@every
def test_another_dtype(kind):
    """Before there is a state it is taken note of; after, the way out is named and works."""
    model = net().float()
    opt = MAKE[kind](model, **gaussian(kind))
    model.double()
    opt.step(closure_of(opt, model))
    held = {v.dtype for s in state_of(opt) for v in s.values() if v.is_floating_point()}
    assert held == {torch.float64}
    model.float()
    with pytest.raises(
        ValueError, match=r"is torch.float32 on cpu now, its state is torch.float64"
    ):
        opt.step(closure_of(opt, model))
    twin = MAKE[kind](model, **gaussian(kind))
    twin.load_state_dict(opt.state_dict())
    twin.step(closure_of(twin, model))
    held = {v.dtype for s in state_of(twin) for v in s.values() if v.is_floating_point()}
    assert held == {torch.float32}


@pytest.mark.parametrize("kind", [*sorted(MAKE), "hessian_free", "layerwise"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_are_refused(kind, copied):
    model = net()
    others = {
        "hessian_free": lambda: HessianFree(model),
        "layerwise": lambda: LayerwiseStep(torch.optim.SGD(model.parameters(), lr=0.1), model),
    }
    opt = others[kind]() if kind in others else MAKE[kind](model)
    with pytest.raises(TypeError, match=r"cannot be copied or pickled: .* state_dict\(\)"):
        copied(opt)
    copied(model)  # the model can be, hooks and all


@pytest.mark.parametrize("method", SAMPLING)
@pytest.mark.parametrize(
    ("saved", "loaded"), [("gaussian", "empirical"), ("empirical", "gaussian")]
)
def test_a_state_brings_its_likelihood(method, saved, loaded):
    model = net()
    opt = method(model, lr=0.01, likelihood=saved)
    opt.step(closure_of(opt, model))
    twin_model = copy.deepcopy(model)
    twin = method(twin_model, lr=0.01, likelihood=loaded)
    twin.load_state_dict(opt.state_dict())
    for _ in range(2):
        opt.step(closure_of(opt, model))
        twin.step(closure_of(twin, twin_model))
    assert torch.equal(weights(model), weights(twin_model))


def test_labels_of_another_kind_of_device_are_drawn_anew():
    model = net()
    opt = KFAC(model, likelihood="gaussian")
    state = opt.state_dict() | {"labels": torch.zeros(16, dtype=torch.uint8)}  # as CUDA's
    before = opt._harness.labels.get_state()
    with pytest.warns(UserWarning, match="another kind of device than cpu; labels are drawn from"):
        opt.load_state_dict(state)
    assert torch.equal(opt._harness.labels.get_state(), before)


def backward(model, x):
    def closure():
        model.zero_grad()
        (0.5 * model(x).square().sum() / len(x)).backward()

    return closure


# ExactFisher takes the last batch alone
@pytest.mark.parametrize("kind", each(k for k in MAKE if "exact" not in k))
def test_a_bad_batch_in_warm_up_is_named_and_warm_up_can_come_again(kind):
    model = net()
    opt = MAKE[kind](model, **gaussian(kind))
    bad = X.clone()
    bad[0, 0] = float("nan")
    good = [backward(model, X), backward(model, X + 1)]
    with pytest.raises(NumericalError, match=r"batch 2 of warm_up gives '0.* NaN or infinity"):
        opt.warm_up([good[0], backward(model, bad), good[1]])
    fresh_model = net()
    fresh = MAKE[kind](fresh_model, **gaussian(kind))
    if fresh._harness.labels is not None:  # some have been drawn for the first batches
        fresh._harness.labels.set_state(opt._harness.labels.get_state())
    opt.warm_up(good)
    fresh.warm_up([backward(fresh_model, X), backward(fresh_model, X + 1)])
    assert same(state_of(opt), state_of(fresh))


@every
@pytest.mark.parametrize("case_name", ["mlp", "cnn"])
def test_warm_up_inside_autocast(kind, case_name):
    """The statistics are those of the closures, which see to their own precision."""
    results = []
    for enabled in (False, True):
        case = CASES[case_name]()
        case.model.float()
        opt = make_for(kind, case)

        def closure(case=case):
            with torch.autocast("cpu", enabled=False):
                case.model.zero_grad()
                x, t = (v.float() if v.is_floating_point() else v for v in case.batches[0])
                case.loss(case.model, (x, t)).backward()

        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            opt.warm_up([closure])
        results.append(state_of(opt))
    assert same(*results)


@pytest.mark.parametrize("method", SAMPLING)
def test_outputs_that_no_label_can_be_drawn_for(method):
    class Flat(nn.Module):
        def __init__(self, shape):
            super().__init__()
            self.layer, self.shape = nn.Linear(4, 1), shape

        def forward(self, x):
            return self.layer(x).mean() if self.shape == () else self.layer(x)[:, 0]

    model = Flat((-1,))
    opt = method(model, likelihood="categorical")  # hooks live as long as it does
    with pytest.raises(ValueError, match=r"needs an output \[batch, classes, ...\].*got \[12\]"):
        model(X)
    model = Flat(())
    opt = method(model, likelihood="gaussian")
    with pytest.raises(ValueError, match="returned a single number"):
        model(X)
    del opt


def test_hessian_free_of_classes_without_a_class_dimension():
    model = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    opt = HessianFree(model, likelihood="categorical")
    with pytest.raises(ValueError, match=r"needs an output \[batch, classes, ...\]"):
        opt.step(closure_of(opt, model))


@pytest.mark.parametrize("method", [KBFGS, HessianFree, KFAC2015])
def test_a_refused_scaler_leaves_nothing_behind(method):
    model = net()
    opt = method(model, **({"likelihood": "gaussian"} if method is KFAC2015 else {}))
    opt.found_inf, opt.grad_scale = torch.zeros(()), torch.full((), 8.0)  # as GradScaler.step
    with pytest.raises(ValueError, match="GradScaler"):
        opt.step()
    opt.step(closure_of(opt, model))


def test_layerwise_step_in_half_precision():
    """A sum of 160,000 gradients of 1 overflows float16; they are finite all the same."""
    model = nn.Linear(400, 400, bias=False).half()
    opt = LayerwiseStep(torch.optim.SGD(model.parameters(), lr=1e-4), model)

    def closure():
        opt.zero_grad()
        loss = model.weight.float().sum()
        loss.backward()
        return loss.detach()

    opt.step(closure)
    assert (model.weight.grad == 1).all()
    assert "step not finite" not in opt.summary()
    assert torch.isfinite(model.weight).all()


@pytest.mark.parametrize("method", [KFAC, TNT, ExactFisher, MBF])
def test_a_step_that_overflows_is_counted(method):
    """Gradients that are finite, and so is the state, and their product is not."""
    model = net()
    opt = method(model, damping=1e-9, momentum=0.0)
    for _ in range(2):
        opt.step(closure_of(opt, model))
    closure, before = closure_of(opt, model), weights(model)

    def huge():
        loss = closure()
        for p in model.parameters():
            p.grad.fill_(1e306)
        return loss

    with opt.frozen():
        opt.step(huge)
    assert torch.equal(weights(model), before)
    assert "not finite 1" in opt.summary()


class Later:
    """An event that has not happened until it is waited for."""

    done = False

    def query(self):
        return self.done

    def synchronize(self):
        self.done = True


def test_a_verdict_on_its_way_is_in_the_state(monkeypatch):
    """On a GPU: a try again in float64 is due when the run is saved."""
    model = net().float()
    opt = KFAC(model, damping=1e-8, likelihood="gaussian", refresh_every=2, update_every=50)
    opt.step(closure_of(opt, model))
    opt.step(closure_of(opt, model))
    opt.state[model[0].weight]["A"].fill_(1e6)  # lost in 24 bits, not in 53
    monkeypatch.setattr(refresh, "free_to_read", lambda _: False)
    monkeypatch.setattr(refresh, "to_host", lambda flags: (flags.clone(), Later()))
    opt.step(closure_of(opt, model))
    assert opt._harness.refresher.pending
    state = copy.deepcopy(opt.state_dict())
    assert not opt._harness.refresher.pending
    twin_model = copy.deepcopy(model)
    twin = KFAC(twin_model)
    twin.load_state_dict(state)
    opt.step(closure_of(opt, model))
    twin.step(closure_of(twin, twin_model))
    assert torch.equal(weights(model), weights(twin_model))


def test_a_generator_keeps_to_the_host_under_another_default_device():
    model = net()
    opt = HessianFree(model, likelihood="gaussian", curvature_batch=5)
    torch.set_default_device("meta")  # stands for a GPU
    try:
        opt.step(closure_of(opt, model))
    finally:
        torch.set_default_device(None)
    assert len(opt.rows) == 5


def test_tnt_in_the_other_players_turn():
    """A discriminator at rest, whose inputs need a gradient."""
    model = net()
    opt = TNT(model, likelihood="gaussian")
    model.requires_grad_(False)
    x = X.clone().requires_grad_()
    model(x).sum().backward()
    model.requires_grad_(True)
    opt.step(closure_of(opt, model))
    assert x.grad is not None
