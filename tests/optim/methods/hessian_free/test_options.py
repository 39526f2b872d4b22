"""The options of HessianFree against their rules written out."""

import pytest
import torch
from torch import nn

from kronscope import optim
from kronscope.optim.methods.hessian_free import step as hessian_free_step
from kronscope.optim.methods.hessian_free.gauss_newton import GaussNewton
from kronscope.optim.methods.hessian_free.jacobians import Piece
from kronscope.optim.methods.hessian_free.squared_gradients import mean_squares
from tests.optim.cases import closure_of, weights
from tests.optim.methods.hessian_free.cases import (
    SPLITS,
    dense_ggn,
    flat,
    make,
    make_for,
    places,
    solutions,
    step,
)
from tests.optim.models import CASES

both = pytest.mark.parametrize("blocks", SPLITS.values(), ids=SPLITS)
decays = pytest.mark.parametrize(
    ("tau", "decoupled"), [(0.0, False), (0.2, False), (0.2, True)], ids=["", "coupled", "apart"]
)


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
def test_relative_progress_by_hand(phi, ends):
    rule = optim.RelativeProgress(tolerance=0.03, least=2, share=0.0)
    values = [torch.tensor(value) for value in phi]
    reached = [i for i in range(len(values)) if bool(rule.reached(values[: i + 1]))]
    assert reached[:1] == ([] if ends is None else [ends])


def test_relative_progress_over_longer_stretches_later():
    """k = max(least, share i): of a slope of 1 over 1000 + i, k tolerance is what k steps gain."""
    rule = optim.RelativeProgress(tolerance=0.002, least=3, share=0.5)
    values = [torch.tensor(-1000.0 - i) for i in range(3)] + [torch.tensor(-1003.0)] * 30
    for i in range(1, 33):
        k = max(3, i // 2)
        phi, then = values[i], values[max(i - k, 0)]
        assert bool(rule.reached(values[: i + 1])) == (i > k and (phi - then) / phi < k * 0.002)


def test_blocks_that_have_ended_drop_out(monkeypatch):
    asked, products = [], GaussNewton.products

    def counted(self, numbers, v):
        asked.append(list(numbers))
        return products(self, numbers, v)

    monkeypatch.setattr(GaussNewton, "products", counted)
    case = CASES["mlp"]()
    stop = optim.RelativeProgress(tolerance=0.05, least=2)
    opt = make_for(case, [], max_cg=30, stop=stop, damping=0.01)
    step(opt, case, case.batches[0])
    done = [int(opt.state[part.parameters[0]]["counts"][1]) for part in opt.parts]
    assert len(set(done)) > 1
    assert max(done) < 30
    assert asked == [[b for b, n in enumerate(done) if n >= i] for i in range(1, max(done) + 1)]
    asked.clear()
    step(opt, case, case.batches[1])
    assert asked[0] == asked[1] == [0, 1, 2]  # the product with the start, and the first


def loss_at(case, batch, theta, tau):
    """The loss with its L2 term at other parameters; these are put back."""
    old = weights(case.model)
    nn.utils.vector_to_parameters(theta, case.model.parameters())
    with torch.no_grad():
        loss = case.loss(case.model, batch).item() + 0.5 * tau * theta.square().sum().item()
    nn.utils.vector_to_parameters(old, case.model.parameters())
    return loss


def iterates(case, opt, x, g, start, extra):
    """x and φ after each CG iteration, all blocks side by side; extra is added to the diagonal."""
    G = dense_ggn(case, x)
    found = [start.clone() for _ in range(opt.param_groups[0]["max_cg"] + 1)]
    phi = torch.zeros(len(found))
    for part in opt.parts:
        at = places(case.model, part)
        A, v = G[at][:, at] + extra * torch.eye(len(at)), start[at]
        p = r = -g[at] - A @ v
        phi[0] += 0.5 * v @ A @ v + g[at] @ v
        for i in range(1, len(found)):
            alpha = (r @ r) / (p @ A @ p)
            v, old = v + alpha * p, r
            r = r - alpha * A @ p
            p = r + (r @ r) / (old @ old) * p
            found[i][at] = v
            phi[i] += 0.5 * v @ A @ v + g[at] @ v
    return found, phi


def steps_by_hand(blocks, tau, decoupled, name="mlp", count=5, **settings):
    """Before and after each step: all that the rules speak of."""
    case = CASES[name]()
    lr, damping = settings.setdefault("lr", 0.7), settings.setdefault("damping", 0.02)
    own = {"weight_decay": tau, "decoupled_weight_decay": decoupled, "curvature_batch": 2}
    opt = make_for(case, blocks, **own, **settings)
    kept, shrink = (0.0, lr * tau) if decoupled else (tau, 0.0)
    last = torch.zeros_like(weights(case.model))
    for batch in case.batches[:count]:
        theta, factor = weights(case.model), float(opt.factor)
        before = loss_at(case, batch, theta, kept)
        step(opt, case, batch)
        g = flat([p.grad for p in case.model.parameters()]) + kept * theta
        moved = weights(case.model) - (1 - shrink) * theta
        end = weights(case.model)
        nn.utils.vector_to_parameters(theta, case.model.parameters())
        found, phi = iterates(case, opt, batch[0][opt.rows], g, 0.9 * last, factor * damping + kept)
        values = [loss_at(case, batch, theta + v, kept) for v in found]
        nn.utils.vector_to_parameters(end, case.model.parameters())
        last = found[-1]
        yield {
            "case": case, "batch": batch, "opt": opt, "theta": theta, "before": before, "g": g,
            "moved": moved, "found": found, "phi": phi, "values": values, "tau": kept,
            "factor": factor, "damping": damping, "lr": lr,
        }  # fmt: skip


@both
@decays
def test_backtracking_takes_the_iterate_of_its_rule(blocks, tau, decoupled):
    rule, taken = optim.Backtracking(1.5), []
    kept = rule.kept(6)
    assert kept == [1, 2, 3, 5]
    # two examples have six directions of curvature in a layer of rank three
    for seen in steps_by_hand(blocks, tau, decoupled, max_cg=6, backtracking=rule):
        best = 6
        for earlier in reversed(kept):
            if not seen["values"][earlier] < seen["values"][best]:
                break
            best = earlier
        # rounding of six iterations at a condition of some hundred; 2e-7 on some processors
        torch.testing.assert_close(seen["moved"], 0.7 * seen["found"][best], rtol=0, atol=1e-6)
        start = flat(solutions(seen["opt"]).values())
        torch.testing.assert_close(start, seen["found"][6], rtol=0, atol=1e-6)
        taken.append(best)
    assert min(taken) < 6


@both
@decays
def test_line_search_takes_the_first_share_that_is_enough(blocks, tau, decoupled):
    rule, shares = optim.LineSearch(slope=0.1, shrink=0.7), []
    for seen in steps_by_hand(blocks, tau, decoupled, max_cg=6, lr=5.0, line_search=rule):
        full, slope = 5 * seen["found"][-1], 5 * seen["g"] @ seen["found"][-1]
        at = seen["case"], seen["batch"]

        def enough(share, seen=seen, full=full, slope=slope, at=at):
            value = loss_at(*at, seen["theta"] + share * full, seen["tau"])
            return value <= seen["before"] + 0.1 * share * slope

        share = next(0.7**i for i in range(60) if enough(0.7**i))
        assert share == 1 or not enough(share / 0.7)
        torch.testing.assert_close(seen["moved"], share * full, rtol=0, atol=1e-7)
        shares.append(share)
    assert min(shares) < 1


@both
@decays
def test_line_search_gives_up(blocks, tau, decoupled):
    """Nothing moves, no decay either, and that is counted."""
    case, decay = CASES["mlp"](), {"weight_decay": tau, "decoupled_weight_decay": decoupled}
    rule = optim.LineSearch(slope=0.99, shrink=0.9, tries=3)
    opt = make_for(case, blocks, line_search=rule, **decay)
    before, calls = weights(case.model), []
    case.model.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    step(opt, case, case.batches[0])
    assert torch.equal(weights(case.model), before)
    assert len(calls) == 3 + 3  # the closure's, a trial of routes, the curvature batch's
    assert solutions(opt)
    assert "line search failed 1" in opt.summary()


@both
@decays
@pytest.mark.parametrize("damped_model", [False, True])
@pytest.mark.parametrize("searches", [False, True])
def test_adaptive_damping(blocks, tau, decoupled, damped_model, searches, monkeypatch):
    """ρ by its formula; the factor follows, and multiplies the damping of the next step."""
    ratio, rhos = hessian_free_step.reduction_ratio, []
    recorded = lambda *args: rhos.append(ratio(*args)) or rhos[-1]  # noqa: E731
    monkeypatch.setattr(hessian_free_step, "reduction_ratio", recorded)
    rule, factor = optim.AdaptiveDamping(0.6, damped_model), 1.0
    more = {"line_search": optim.LineSearch()} if searches else {}
    for seen in steps_by_hand(blocks, tau, decoupled, max_cg=6, adaptive=rule, **more):
        assert seen["factor"] == pytest.approx(factor, rel=1e-12)
        d, phi = seen["found"][-1], float(seen["phi"][-1])
        if not damped_model:
            phi -= 0.5 * factor * seen["damping"] * float(d.square().sum())
        rho = (seen["values"][-1] - seen["before"]) / phi
        assert float(rhos[-1]) == pytest.approx(rho, rel=1e-6)
        factor *= 0.6 if rho > 0.75 else 1 / 0.6 if rho < 0.25 else 1
        assert float(seen["opt"].factor) == pytest.approx(factor, rel=1e-12)
    assert len(rhos) == 5


@pytest.mark.parametrize("tau", [0.0, 0.3])
@pytest.mark.parametrize("damped_model", [False, True])
def test_on_a_quadratic_the_model_without_damping_foresees_all(tau, damped_model, monkeypatch):
    ratio, rhos = hessian_free_step.reduction_ratio, []
    recorded = lambda *args: rhos.append(ratio(*args)) or rhos[-1]  # noqa: E731
    monkeypatch.setattr(hessian_free_step, "reduction_ratio", recorded)
    model, x, t = nn.Linear(3, 2), torch.randn(8, 3), torch.randn(8, 2)
    rule = optim.AdaptiveDamping(damped_model=damped_model)
    opt = make(
        model, None, "gaussian", curvature_batch=8, weight_decay=tau, adaptive=rule, damping=4.0
    )
    for _ in range(4):
        opt.step(closure_of(opt, model, (x, t), CASES["shared"]().loss))
    for rho in rhos:
        assert rho > 1.01 if damped_model else abs(rho - 1) < 1e-9
    assert float(opt.factor) == pytest.approx((2 / 3) ** 4)


@both
@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_squares_of_examples_gradients_equal_a_loop(name, blocks, at_once):
    case = CASES[name]()
    model, batch = case.model, case.batches[0]
    rows, pieces, expected = torch.tensor([1, 2, 5, 7]), [], 0
    output = model(batch[0])
    (gradient,) = torch.autograd.grad(case.loss(lambda _: output, batch), output)
    for own in rows.split([3, 1]):
        pieces.append(Piece(model, len(own), (batch[0][own],), {}, gradient[own]))
    for row in rows:
        loss = case.loss(model, tuple(part[row : row + 1] for part in batch))
        expected = expected + flat(torch.autograd.grad(loss, list(model.parameters()))).square() / 4
    parts = make_for(case, blocks).parts
    rule = optim.DiagonalPreconditioner(at_once=at_once)
    found = mean_squares(pieces, [part.parameters for part in parts], 8, rule)
    for part, squares in zip(parts, found, strict=True):
        torch.testing.assert_close(flat(squares), expected[places(model, part)])
