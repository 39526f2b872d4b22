"""Means over the gradients of single examples: what EKFAC and TKFAC gather alike."""

import copy

import pytest
import torch
from torch import nn

from kronscope.optim.capture import positions
from kronscope.optim.methods.ekfac.ekfac import EKFAC
from kronscope.optim.methods.tkfac.tkfac import TKFAC
from tests.optim.models import CASES

METHODS = [EKFAC, TKFAC]

both = pytest.mark.parametrize("method", METHODS)
every_case = pytest.mark.parametrize("name", sorted(CASES))


def built(method, name, m=8, **settings):
    """A fresh case and its optimizer, by the data's labels unless told otherwise."""
    case = CASES[name](m=m)
    settings = {"lr": 0.3, "damping": 0.3, "likelihood": "empirical", **settings}
    return case, method(case.model, **settings)


def steps(opt, case, batches):
    for batch in batches:
        opt.zero_grad()
        case.loss(case.model, batch).backward()
        opt.step()


def parameters(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def snapshot(opt):
    return {
        (i, key): value.clone()
        for i, state in enumerate(opt.state.values())
        for key, value in state.items()
    }


def curvatures(opt):
    return {name: C @ torch.eye(C.shape[0]) for name, C in opt.curvature().items()}


@both
@every_case
@pytest.mark.parametrize("sizes", [(4, 4), (5, 2, 1)])
def test_micro_batches_are_the_batch(method, name, sizes):
    one, many = built(method, name), built(method, name)
    for x, t in one[0].batches[:4]:
        steps(one[1], one[0], [(x, t)])
        case, opt = many
        opt.zero_grad()
        for part in zip(x.split(sizes), t.split(sizes), strict=True):
            (case.loss(case.model, part) * len(part[0]) / len(x)).backward()
        opt.step()
    # two orders of the same sums, four steps
    torch.testing.assert_close(
        parameters(many[0].model), parameters(one[0].model), rtol=1e-10, atol=1e-12
    )


@both
@every_case
def test_pieces_of_one_example(method, name, monkeypatch):
    whole = built(method, name)
    steps(whole[1], whole[0], whole[0].batches[:2])
    monkeypatch.setattr(positions, "PIECE", 1)
    cut = built(method, name)
    steps(cut[1], cut[0], cut[0].batches[:2])
    for layer, C in curvatures(whole[1]).items():
        torch.testing.assert_close(curvatures(cut[1])[layer], C)


class Halves(nn.Module):
    """A layer called on both halves of the input, as the whole model or through its parts."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x[:, :3]) + self.layer(x[:, 3:])


@both
def test_calls_outside_the_forward_are_further_examples(method):
    """Inside one forward they are positions: V is squared after their sum, not before."""
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    found = {}
    for inside in (True, False):
        torch.manual_seed(1)
        model = Halves()
        opt = method(model, decay=0.0, likelihood="empirical")
        z = model(x) if inside else model.layer(x[:, :3]) + model.layer(x[:, 3:])
        (0.5 * z.square().sum() / len(x)).backward()
        opt.step()
        found[inside] = curvatures(opt)["layer"].trace()
    a = torch.cat([x.unflatten(1, (2, 3)), torch.ones(5, 2, 1)], 2)
    torch.manual_seed(1)
    g = Halves()(x).detach()
    summed = g.square().sum(1) * a.sum(1).square().sum(1)
    torch.testing.assert_close(found[True], summed.mean())
    # apart: ten examples under a loss whose mean is over ten, so gradients weigh twice
    apart = (2 * g[:, None]).square().sum(2) * a.square().sum(2)
    torch.testing.assert_close(found[False], apart.mean())


class Uneven(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x) + self.layer(x[:1])


@both
def test_different_batches_in_one_forward_are_refused(method):
    model = Uneven()
    opt = method(model, likelihood="empirical")
    model(torch.ones(4, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"layer 'layer' .* batches of \[1, 4\] examples"):
        opt.step()


@both
def test_two_backwards_through_one_forward(method):
    case, opt = built(method, "mlp", likelihood="bernoulli")
    loss = case.loss(case.model, case.batches[0])
    loss.backward(retain_graph=True)
    loss.backward()
    opt.step()  # sampled labels: the second brings nothing new
    assert opt.state[case.model[0].weight]["counts"][0] == 1
    case, opt = built(method, "mlp")
    loss = case.loss(case.model, case.batches[0])
    loss.backward(retain_graph=True)
    with pytest.raises(ValueError, match="two backwards through one forward"):
        loss.backward()


@both
@every_case
@pytest.mark.parametrize("empirical", [False, True])
def test_frozen_steps_are_honest(method, name, empirical):
    likelihood = "empirical" if empirical else CASES[name]().likelihood
    case, opt = built(method, name, likelihood=likelihood, momentum=0.0)
    steps(opt, case, case.batches[:3])
    held = snapshot(opt)
    modules = dict(case.model.named_modules())
    with opt.frozen():
        before = {n: w_bar(modules[n]) for n in opt.preconditioner()}
        opt.zero_grad()
        case.loss(case.model, case.batches[3]).backward()
        expected = {
            n: -0.3 * (P @ w_bar(modules[n], grad=True).reshape(-1))
            for n, P in opt.preconditioner().items()
        }
        opt.step()
    for n, change in expected.items():
        # rounding of W + change, entries of order one
        actual = (w_bar(modules[n]) - before[n]).reshape(-1)
        torch.testing.assert_close(actual, change, rtol=1e-10, atol=1e-14)
    for key, value in snapshot(opt).items():
        assert key[1] == "momentum" or torch.equal(value, held[key])


def w_bar(layer, *, grad=False):
    """[W, b] or its gradient."""
    parts = [p.grad if grad else p.detach().clone() for p in layer.parameters()]
    return torch.cat([p.reshape(len(layer.weight), -1) for p in parts], 1)


@both
@pytest.mark.parametrize("stagger", [False, True])
@pytest.mark.parametrize("done", [1, 2, 4])
def test_resume_is_bit_exact(method, stagger, done):
    settings = {"likelihood": "categorical", "update_every": 2, "refresh_every": 3}
    settings |= {"stagger": stagger, "weight_decay": 0.01}
    case, opt = built(method, "cnn", m=4, **settings)
    steps(opt, case, case.batches[:done])
    other, resumed = built(method, "cnn", m=4, **settings)
    other.model.load_state_dict(case.model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    steps(opt, case, case.batches[done : done + 4])
    steps(resumed, other, case.batches[done : done + 4])
    assert torch.equal(parameters(case.model), parameters(other.model))
    again = snapshot(resumed)
    for key, value in snapshot(opt).items():
        assert torch.equal(value, again[key])


@both
@every_case
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_batches_leave_the_state_finite(method, name, bad):
    case, opt = built(method, name, refresh_every=1)
    steps(opt, case, case.batches[:2])
    held = {key: v for key, v in snapshot(opt).items() if key[1] not in ("counts", "momentum")}
    x, t = case.batches[2]
    poisoned = x.clone()
    poisoned.reshape(-1)[0] = bad
    steps(opt, case, [(poisoned, t)])
    now = snapshot(opt)
    first = next(iter(case.model.parameters()))
    assert opt.state[first]["counts"].reshape(-1, 4)[:, 3].min() >= 1
    assert all(torch.isfinite(value).all() for value in now.values())
    for key, value in held.items():
        if key[0] == 0:
            # a carried S is multiplied by squares of products that are the identity to rounding
            torch.testing.assert_close(value, now[key], rtol=1e-12, atol=1e-14)
    steps(opt, case, case.batches[3:5])
    assert torch.isfinite(parameters(case.model)).all()


@both
def test_rows_are_not_kept_beyond_zero_grad(method):
    case, opt = built(method, "mlp")
    case.loss(case.model, case.batches[0]).backward()
    assert opt._harness.capture.totals["0"].kept
    opt.zero_grad()
    assert not opt._harness.capture.totals


@both
def test_parameters_and_settings(method):
    case = CASES["mlp"]()
    with pytest.raises(ValueError, match="damping must be a positive number"):
        method(case.model, damping=0.0)
    with pytest.raises(ValueError, match="no likelihood 'poisson'"):
        method(case.model, likelihood="poisson")
    with pytest.raises(RuntimeError, match="no state yet"):
        method(case.model).preconditioner()


@both
def test_squares_that_overflow_are_not_learned(method):
    """x and g of 1e80 have finite moments of their own, 1e160; their product's is 1e320."""
    model = nn.Linear(1, 1)
    opt = method(model, likelihood="empirical")
    for size in (1.0, 1e80):
        opt.zero_grad()
        x = torch.full((2, 1), size)
        (0.5 * (model(x) - size).square().sum() / 2).backward()
        opt.step()
    state = opt.state[model.weight]
    assert state["counts"].tolist() == [1, 2, 0, 1]
    assert all(torch.isfinite(value).all() for value in state.values())


@both
@pytest.mark.parametrize("empirical", [False, True])
def test_the_scale_of_a_grad_scaler_comes_off(method, empirical):
    likelihood = "empirical" if empirical else "categorical"
    plain, scaled = (built(method, "cnn", likelihood=likelihood) for _ in range(2))
    scaled[1].load_state_dict(plain[1].state_dict())  # the same labels
    steps(plain[1], plain[0], plain[0].batches[:3])
    (case, opt), scaler = scaled, torch.amp.GradScaler("cpu", init_scale=512.0)
    for batch in case.batches[:3]:
        opt.zero_grad()
        scaler.scale(case.loss(case.model, batch)).backward()
        scaler.step(opt)
        scaler.update()
    # a power of two: the same but for the rounding of 1 / scale², three steps
    torch.testing.assert_close(
        parameters(case.model), parameters(plain[0].model), rtol=1e-12, atol=1e-14
    )
