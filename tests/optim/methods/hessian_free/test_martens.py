"""MartensHessianFree against its rules written out with dense matrices, in float64."""

import pytest
import torch
from torch import nn

from kronscope.optim import HessianFree, MartensHessianFree
from kronscope.optim.methods.hessian_free import martens, squared_gradients
from kronscope.optim.methods.hessian_free.jacobians import Piece
from kronscope.optim.methods.hessian_free.martens import kept_iterations, progress_is_slow
from kronscope.optim.methods.hessian_free.squared_gradients import mean_squares
from tests.optim.cases import closure_of, weights
from tests.optim.methods.hessian_free.cases import (
    both,
    conjugate_gradients,
    dense_ggn,
    flat,
    make,
    make_for,
    mean_square_gradient,
    places,
    solutions,
    step,
)
from tests.optim.models import CASES

decays = pytest.mark.parametrize(
    ("tau", "decoupled"), [(0.0, False), (0.2, False), (0.2, True)], ids=["", "coupled", "apart"]
)


@pytest.fixture
def rule(monkeypatch):
    """Constants of the stopping rule."""

    def give(tolerance, least, share):
        for name, value in {"TOLERANCE": tolerance, "LEAST": least, "SHARE": share}.items():
            monkeypatch.setattr(martens, name, value)

    return give


@pytest.mark.parametrize(
    ("phi", "ends"),
    [
        ([0.0, -1.0, -1.5, -1.9, -1.99, -1.991, -1.992], 5),  # 2 steps gain 0.092 of 1.991
        ([3.0, 2.9, 2.8, 2.7999, 2.7998, 2.7997, -1.0, -1.001, -1.002], 8),  # not above zero
        ([0.0, -1e-9, -1e-9], None),  # too early: i must be above k
        ([0.0, -1.0, -2.0, -3.0, -4.0, -5.0], None),
        ([float("nan")] * 5, None),
    ],
)
def test_relative_progress_by_hand(phi, ends, rule):
    rule(0.03, 2, 0.0)
    values = [torch.tensor(value) for value in phi]
    reached = [i for i in range(len(values)) if bool(progress_is_slow(values[: i + 1]))]
    assert reached[:1] == ([] if ends is None else [ends])


def test_relative_progress_over_longer_stretches_later(rule):
    """k = max(least, share i): of a slope of 1 over 1000 + i, k tolerance is what k steps gain."""
    rule(0.002, 3, 0.5)
    values = [torch.tensor(-1000.0 - i) for i in range(3)] + [torch.tensor(-1003.0)] * 30
    for i in range(1, 33):
        k = max(3, i // 2)
        phi, then = values[i], values[max(i - k, 0)]
        assert bool(progress_is_slow(values[: i + 1])) == (i > k and (phi - then) / phi < k * 0.002)


def loss_at(case, batch, theta, tau):
    """The loss with its L2 term at other parameters; these are put back."""
    old = weights(case.model)
    nn.utils.vector_to_parameters(theta, case.model.parameters())
    with torch.no_grad():
        loss = case.loss(case.model, batch).item() + 0.5 * tau * theta.square().sum().item()
    nn.utils.vector_to_parameters(old, case.model.parameters())
    return loss


def iterates(case, opt, batch, g, start, extra):
    """x and φ after each CG iteration, all blocks side by side, and where each block ended."""
    G, limit = dense_ggn(case, batch[0][opt.rows]), opt.param_groups[0]["max_cg"]
    squares = mean_square_gradient(case, batch, opt.rows)
    found, phi, ends = [start.clone() for _ in range(limit + 1)], torch.zeros(limit + 1), []
    for part in opt.parts:
        at = places(case.model, part)
        A = G[at][:, at] + extra * torch.eye(len(at))
        D = (squares[at] + extra) ** 0.75
        own, values = conjugate_gradients(
            A, -g[at], start[at], limit, D, lambda phi: bool(progress_is_slow(phi))
        )
        ends.append(len(own) - 1)
        for i in range(limit + 1):
            found[i][at] = own[min(i, ends[-1])]
            phi[i] += values[min(i, ends[-1])]
    return found, phi, ends


def walk(blocks, tau, decoupled, lr, damping):
    """Follow six steps by hand; of each the iterate taken, where blocks ended, share and factor."""
    case = CASES["mlp"]()
    opt = make_for(
        case, blocks, method=MartensHessianFree, lr=lr, damping=damping, momentum=0.9,
        max_cg=5, curvature_batch=2, weight_decay=tau, decoupled_weight_decay=decoupled,
    )  # fmt: skip
    kept, shrink = (0.0, lr * tau) if decoupled else (tau, 0.0)
    last, factor = torch.zeros_like(weights(case.model)), 1.0
    for batch in case.batches[:6]:
        theta, before = weights(case.model), loss_at(case, batch, weights(case.model), kept)
        step(opt, case, batch)
        end, g = weights(case.model), flat([p.grad for p in case.model.parameters()]) + kept * theta
        nn.utils.vector_to_parameters(theta, case.model.parameters())
        found, phi, ends = iterates(case, opt, batch, g, 0.9 * last, factor * damping + kept)
        value = lambda s, at=(case, batch), theta=theta: loss_at(*at, theta + s, kept)  # noqa: E731
        last, best = found[-1], 5
        for earlier in reversed(kept_iterations(5)):
            if not torch.equal(found[earlier], found[best]):
                if not value(found[earlier]) < value(found[best]):
                    break
                best = earlier
        d = found[best]
        predicted = float(phi[best]) - 0.5 * factor * damping * float(d.square().sum())
        rho = (value(d) - before) / predicted if predicted < 0 else 0.5  # says nothing
        factor *= 2 / 3 if rho > 0.75 else 3 / 2 if rho < 0.25 else 1
        fall = 0.01 * lr * float(g @ d)
        tries = [0.8**i for i in range(60)]
        share = next((s for s in tries if value(s * lr * d) <= before + s * fall), 0.0)
        nn.utils.vector_to_parameters(end, case.model.parameters())
        # rounding of five iterations at a condition of some hundred
        moved, tolerance = end - theta, {"rtol": 0, "atol": 1e-6 * lr}
        expected = share * lr * d - shrink * theta * (share > 0)
        torch.testing.assert_close(moved, expected, **tolerance)
        torch.testing.assert_close(flat(solutions(opt).values()), last, **tolerance)
        assert float(opt.factor) == pytest.approx(factor, rel=1e-12)
        yield best, min(ends), share, factor


@both
@decays
def test_steps_follow_the_rules(blocks, tau, decoupled, rule, monkeypatch):
    """By hand with dense matrices; each rule takes effect somewhere."""
    rule(0.05, 2, 0.1)
    # fewer iterations than directions of curvature (six of two examples in a layer of rank three)
    monkeypatch.setattr(martens, "SPACING", 1.5)
    monkeypatch.setattr(squared_gradients, "AT_ONCE", 1)
    assert kept_iterations(5) == [1, 2, 3, 5]
    seen = [
        *walk(blocks, tau, decoupled, 1.0, 0.02),
        *walk(blocks, tau, decoupled, 5.0, 0.1),
    ]
    best, ends, shares, factors = zip(*seen, strict=True)
    assert min(best) < 5
    assert min(ends) < 5
    assert min(shares) < 1
    assert len(set(factors)) > 1


@both
@decays
def test_line_search_gives_up(blocks, tau, decoupled, monkeypatch):
    """Nothing moves, no decay either, and that is counted."""
    for name, value in {"SLOPE": 0.99, "SHRINK": 0.9, "TRIES": 3}.items():
        monkeypatch.setattr(martens, name, value)
    case, decay = CASES["mlp"](), {"weight_decay": tau, "decoupled_weight_decay": decoupled}
    opt = make_for(case, blocks, method=MartensHessianFree, **decay)
    before = weights(case.model)
    step(opt, case, case.batches[0])
    assert torch.equal(weights(case.model), before)
    assert solutions(opt)
    assert "line search failed 1" in opt.summary()


@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_on_a_quadratic_the_model_without_damping_foresees_all(tau, monkeypatch):
    ratio, rhos = martens.reduction_ratio, []
    recorded = lambda *args: rhos.append(ratio(*args)) or rhos[-1]  # noqa: E731
    monkeypatch.setattr(martens, "reduction_ratio", recorded)
    model, x, t = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)
    opt = make(
        model, None, "gaussian", method=MartensHessianFree, curvature_batch=8, weight_decay=tau,
        damping=4.0,
    )  # fmt: skip
    for _ in range(4):
        opt.step(closure_of(opt, model, (x, t), CASES["shared"]().loss))
    assert all(abs(rho - 1) < 1e-9 for rho in rhos)
    assert float(opt.factor) == pytest.approx((2 / 3) ** 4)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("at_once", [1, 3])
def test_squares_of_examples_gradients_equal_a_loop(name, at_once, monkeypatch):
    monkeypatch.setattr(squared_gradients, "AT_ONCE", at_once)
    case = CASES[name]()
    model, batch = case.model, case.batches[0]
    rows, pieces = torch.tensor([1, 2, 5, 7]), []
    output = model(batch[0])
    (gradient,) = torch.autograd.grad(case.loss(lambda _: output, batch), output)
    for own in rows.split([3, 1]):
        pieces.append(Piece(model, len(own), (batch[0][own],), {}, gradient[own]))
    expected, parts = mean_square_gradient(case, batch, rows), make_for(case, []).parts
    found = mean_squares(pieces, [part.parameters for part in parts], 8)
    for part, squares in zip(parts, found, strict=True):
        torch.testing.assert_close(flat(squares), expected[places(model, part)])


def test_options_and_states_of_earlier_versions():
    """Options are refused with what to use instead; so is the state of the wrong class."""
    model = CASES["mlp"]().model
    with pytest.raises(TypeError, match="HessianFree takes no stop=; MartensHessianFree has"):
        HessianFree(model, stop=None)
    plain, own = HessianFree(model), MartensHessianFree(model)
    plain.load_state_dict({**plain.state_dict(), "factor": torch.ones(())})
    with pytest.raises(ValueError, match=r"adaptive damping \(factor 0.5\).* MartensHessianFree"):
        plain.load_state_dict({**plain.state_dict(), "factor": torch.tensor(0.5)})
    with pytest.raises(ValueError, match="no damping factor: it is HessianFree's"):
        own.load_state_dict(plain.state_dict())
