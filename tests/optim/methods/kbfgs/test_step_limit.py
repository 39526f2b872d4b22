"""The limit on a step's curvature: κ against dense matrices, and what is shortened and what not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.optim import KBFGS, KBFGSLimited
from kronscope.optim.methods.kbfgs import step_limit
from tests.optim.cases import autoencoder, batches, closure_of, count, loss_of

DATA = batches(40)


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def momenta(opt):
    """M of every parameter, in the parameters' order; W_bar's bias column apart from its weight."""
    parts = []
    for layer in (m for m in opt._harness.model.modules() if isinstance(m, nn.Linear)):
        M = opt.state[layer.weight]["momentum"]
        parts += [M[:, :-1].flatten(), M[:, -1]]
    return torch.cat(parts)


def counted(opt):
    block = next(iter(opt._harness.stack_of))
    return count(opt, block.weight, "step shortened")


def train(limit, steps=12, lr=0.3, **settings):
    model = autoencoder()
    if limit is None:
        opt = KBFGS(model, lr=lr, **settings)
    else:
        opt = KBFGSLimited(model, lr=lr, curvature_limit=limit, **settings)
    points = [flat(model)]
    for x in DATA[:steps]:
        opt.step(closure_of(opt, model, x))
        points.append(flat(model))
    return model, opt, points


def test_kappa_is_the_curvature_along_the_step_over_the_planned_one():
    """On a quadratic loss, d·H d / (d·P⁻¹d / lr) with dense H and P."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(False)
    model[0].requires_grad_()  # one layer: linear in its parameters
    x, t = torch.randn(20, 4), torch.randn(20, 2)
    opt = KBFGSLimited(model, lr=0.7, momentum=0.0, curvature_limit=1e-6)

    def loss():
        return F.mse_loss(model(x), t)

    def closure():
        opt.zero_grad()
        value = loss()
        value.backward()
        return value

    opt.step(closure)
    start, P = flat(model[0]), opt.preconditioner()["0"]
    dense = torch.kron(P.left, P.right)
    order = torch.cat([torch.arange(15).reshape(3, 5)[:, :4].flatten(), torch.arange(4, 15, 5)])
    own = list(model[0].parameters())
    g = torch.cat([v.flatten() for v in torch.autograd.grad(loss(), own)])
    rows = [torch.autograd.grad(v, own, retain_graph=True) for v in gradient(loss(), own)]
    H = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    d = -0.7 * dense[order][:, order] @ g
    kappa = (d @ H @ d) / (d @ torch.linalg.solve(dense[order][:, order], d) / 0.7)
    opt.step(closure)
    taken = flat(model[0]) - start
    torch.testing.assert_close(taken, d * 1e-6 / kappa, rtol=1e-5, atol=1e-12)
    assert opt.curvature_ratio.item() == pytest.approx(kappa.item(), rel=1e-6)


def gradient(loss, parameters):
    parts = torch.autograd.grad(loss, parameters, create_graph=True)
    return torch.cat([part.flatten() for part in parts])


def test_the_factor():
    def kept(rise, limit=2.0, slope=-1.0, planned=1.0, loss=10.0):
        step = step_limit.Taken({}, {}, torch.tensor(slope), torch.tensor(planned))
        loss = torch.tensor(loss)
        return step_limit.kept(step_limit.ratio(step, loss, loss + rise), limit).item()

    assert kept(-0.5) == 1.0  # d·H d = 1, as planned
    assert kept(-0.01) == 1.0
    assert kept(1.0) == pytest.approx(0.5)  # 4: twice the limit
    assert kept(1.0, limit=1.0) == pytest.approx(0.25)
    assert kept(-3.0) == 1.0  # curves downwards
    assert kept(float("inf")) == 0.0
    assert kept(float("nan")) == 0.0
    assert kept(0.0, slope=0.0, planned=0.0) == 1.0
    assert kept(1e-15, slope=0.0, planned=1e-18) == 1.0  # rounding of the loss is no curvature


def test_without_cause_nothing_changes_bit_for_bit():
    _, plain, published = train(None)
    _, limited, ours = train(1e6)
    assert all(torch.equal(a, b) for a, b in zip(published, ours, strict=True))
    assert counted(limited) == counted(plain) == 0
    held, other = plain.state_dict()["state"], limited.state_dict()["state"]
    for place, state in held.items():
        assert all(torch.equal(value, other[place][key]) for key, value in state.items())


def test_a_shortened_step_lies_on_the_published_one_and_teaches_the_same():
    model, opt, points = train(1e6, steps=6)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    ends = {}
    for limit in (float("inf"), 1e-3):
        again = autoencoder()
        again.load_state_dict(saved[0])
        own = KBFGSLimited(again, lr=0.3)
        own.load_state_dict(copy.deepcopy(saved[1]))
        own.param_groups[0]["curvature_limit"] = limit
        own.step(closure_of(own, again, DATA[6]))
        ends[limit] = flat(again), momenta(own), own
    (whole, M, plain), (short, m, limited) = ends[float("inf")], ends[1e-3]
    d, cut = whole - points[-1], short - points[-1]
    kept = (cut.norm() / d.norm()).item()
    assert 0 < kept < 1
    torch.testing.assert_close(cut, kept * d, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(m, kept * M, rtol=1e-6, atol=1e-12)
    assert counted(limited) == 1
    assert "step shortened" in limited.summary()
    for name, P in plain.preconditioner().items():
        assert torch.equal(P.left, limited.preconditioner()[name].left)
        assert torch.equal(P.right, limited.preconditioner()[name].right)


def test_a_layer_without_a_finite_gradient_hides_nothing_of_the_others():
    """It does not move; the others' step is shortened by the ratio of theirs."""
    model, opt, _ = train(1e-3, steps=6)
    last = model[-1]
    still, before = last.weight.detach().clone(), flat(model)
    closure = closure_of(opt, model, DATA[6])

    def broken():
        loss = closure()
        if last.weight.grad is not None:
            last.weight.grad.fill_(float("nan"))
        return loss

    opt.step(broken)
    assert torch.equal(last.weight, still)
    assert 0 < opt.curvature_ratio.item() < float("inf")
    assert not torch.equal(flat(model), before)


def test_it_holds_where_the_published_algorithm_diverges():
    """Learning rates far too large: the loss still falls, and every parameter stays finite."""
    for settings in ({}, {"history": 3}):
        ends = {}
        for limit in (None, 10.0):
            model, opt, points = train(limit, steps=40, lr=30.0, **settings)
            ends[limit] = loss_of(model, DATA[0]).item()
            if limit:
                assert counted(opt) > 0
                assert torch.isfinite(points[-1]).all()
        first = loss_of(autoencoder(), DATA[0]).item()
        assert ends[10.0] < first < ends[None]


def test_a_loss_that_is_not_finite_undoes_the_step():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.LayerNorm(2))
    opt = KBFGSLimited(model, lr=0.1, curvature_limit=10.0)
    x, calls = torch.randn(8, 4), []

    def closure():
        opt.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        calls.append(loss)
        return loss * float("inf") if len(calls) % 2 == 0 else loss

    start = flat(model)
    opt.step(closure)
    assert torch.equal(flat(model), start)
    assert counted(opt) == 1
    assert not any(state["momentum"].any() for state in opt.state.values() if "momentum" in state)


def test_a_resumed_run_goes_on_bit_for_bit():
    _, _, whole = train(0.02, steps=12)
    model, opt, _ = train(0.02, steps=6)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    again = autoencoder()
    again.load_state_dict(saved[0])
    own = KBFGSLimited(again)
    own.load_state_dict(saved[1])
    for x in DATA[6:12]:
        own.step(closure_of(own, again, x))
    assert torch.equal(flat(again), whole[-1])
    assert counted(own) > 0


def test_decoupled_weight_decay_is_no_part_of_the_step():
    """κ is that of d = -lr P alone, and lr τ θ comes off at the end whatever became of d."""
    found = {}
    for tau in (0.0, 0.1):
        model = nn.Sequential(autoencoder(), nn.LayerNorm(6))  # the plain rule decays too
        own = {"weight_decay": tau, "decoupled_weight_decay": True, "curvature_limit": 1e-3}
        opt, start = KBFGSLimited(model, lr=3.0, **own), flat(model)
        opt.step(closure_of(opt, model, DATA[0]))
        assert counted(opt) == 1
        found[tau] = flat(model), opt.curvature_ratio
    (plain, kappa), (decayed, same) = found.values()
    assert kappa.item() == pytest.approx(same.item(), rel=1e-6)
    torch.testing.assert_close(decayed, plain - 3.0 * 0.1 * start)
    # of this a part with a bad gradient is left out, as without the limit
    model = autoencoder()
    opt = KBFGSLimited(model, lr=0.3, **own)
    closure, last = closure_of(opt, model, DATA[0]), model[-1].weight.detach().clone()

    def broken():
        loss = closure()
        if model[-1].weight.grad is not None:
            model[-1].weight.grad.fill_(float("nan"))
        return loss

    opt.step(broken)
    assert torch.equal(model[-1].weight, last)


def test_without_a_limit_it_only_measures():
    """∞ keeps even a step to an infinite loss, and changes no bit of any other."""
    _, _, published = train(None)
    _, opt, ours = train(float("inf"))
    assert all(torch.equal(a, b) for a, b in zip(published, ours, strict=True))
    assert opt.curvature_ratio.item() > 0
    assert step_limit.kept(torch.tensor(float("inf")), float("inf")).item() == 1.0


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), None])
def test_refusals(value):
    with pytest.raises(ValueError, match="curvature_limit must be positive, or infinite for none"):
        KBFGSLimited(autoencoder(), curvature_limit=value)
    with pytest.raises(TypeError, match=r"KBFGS takes no curvature_limit=; use KBFGSLimited"):
        KBFGS(autoencoder(), curvature_limit=5.0)
    with pytest.raises(ValueError, match=r"of KBFGS\(curvature_limit=0.5\); use KBFGSLimited"):
        KBFGS(autoencoder()).load_state_dict(train(0.5, steps=1)[1].state_dict())
    with pytest.raises(ValueError, match=r"another optimizer than KBFGSLimited: no \['curvature_"):
        KBFGSLimited(autoencoder()).load_state_dict(train(None, steps=1)[1].state_dict())
