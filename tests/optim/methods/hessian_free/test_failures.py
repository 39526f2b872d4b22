"""HessianFree when numbers fail: nothing moves, what happened is counted, then named."""

import math

import pytest
import torch
from torch import nn

from kronscope import optim
from tests.optim.cases import batches, closure_of, weights
from tests.optim.methods.hessian_free.cases import (
    Bend,
    Between,
    as_on_a_gpu,
    both,
    counts,
    make,
    make_for,
    solutions,
    step,
)
from tests.optim.models import CASES

BAD = {"nan": float("nan"), "inf": float("inf")}
bad = pytest.mark.parametrize("value", BAD.values(), ids=BAD)
on_both_paths = pytest.mark.usefixtures("masked")


@pytest.fixture(params=[False, True], ids=["cpu", "as-on-a-gpu"])
def masked(request, monkeypatch):
    """Whether nothing can be read for nothing."""
    if request.param:
        assert as_on_a_gpu(monkeypatch) >= 4
    return request.param


def spoiling(opt, case, batch, parameter, value):
    def closure():
        loss = closure_of(opt, case.model, batch, case.loss)()
        if parameter.grad is not None:
            parameter.grad.view(-1)[1] = value
        return loss

    return closure


def check_kept(opt, before, zero):
    """The last solutions stay, those of the blocks in `zero` are gone."""
    for block, d in solutions(opt).items():
        assert torch.equal(d, torch.zeros_like(d) if block in zero else before[block]), block


@both
@on_both_paths
@bad
@pytest.mark.parametrize(("name", "start"), [("mlp", 0), ("cnn", 2), ("shared", 2)])
def test_one_bad_gradient_stops_all_blocks(name, blocks, value, start):
    case = CASES[name]()
    opt = make_for(case, blocks, weight_decay=0.01)
    for batch in case.batches[:start]:
        step(opt, case, batch)
    before, held = weights(case.model), solutions(opt) if start else None
    part = opt.parts[-1]
    opt.step(spoiling(opt, case, case.batches[start], part.parameters[-1], value))
    assert torch.equal(weights(case.model), before)
    skipped = {part.name: 1 for part in opt.parts}
    expected = {"skipped": skipped, "not finite": {part.name: 1}}
    if start:
        expected = {"steps": {part.name: start for part in opt.parts}} | expected
        check_kept(opt, held, zero=())  # the gradient is at fault, not the start
    assert counts(opt) == expected
    assert "not finite 1" in opt.summary()
    assert (opt.route is None) == (start == 0)  # a model is not judged by NaN
    step(opt, case, case.batches[start + 1])
    assert not torch.equal(weights(case.model), before)
    assert torch.isfinite(weights(case.model)).all()
    assert opt.param_groups[0]["step"] == start + 2
    assert int(opt.state_dict()["failures"]) == 0


@both
@on_both_paths
@bad
@pytest.mark.parametrize("decoupled", [False, True])
def test_a_bad_input_changes_nothing_but_the_counters(blocks, value, decoupled):
    case = CASES["cnn"]()
    opt = make_for(case, blocks, weight_decay=0.1, decoupled_weight_decay=decoupled)
    step(opt, case, case.batches[0])
    before, held = weights(case.model), solutions(opt)
    x, t = case.batches[1]
    spoilt = x.clone()
    spoilt.view(len(x), -1)[3, 1] = value
    step(opt, case, (spoilt, t))
    assert torch.equal(weights(case.model), before)
    assert "0" in counts(opt)["not finite"] or blocks is None
    assert all(torch.isfinite(d).all() for d in solutions(opt).values())
    assert blocks is not None or torch.equal(solutions(opt)["model"], held["model"])
    assert math.isfinite(step(opt, case, case.batches[2]))
    assert torch.isfinite(weights(case.model)).all()


@both
@on_both_paths
@bad
def test_a_bad_product(blocks, value, monkeypatch):
    model, data = Between(), batches(5)
    opt = make(model, blocks)
    for x in data[:2]:
        opt.step(closure_of(opt, model, x))
    before, held = weights(model), solutions(opt)
    monkeypatch.setattr(Bend, "factor", value)
    opt.step(closure_of(opt, model, data[2]))
    assert torch.equal(weights(model), before)
    lost = "model" if blocks is None else "first"  # nothing lies behind the last layer
    check_kept(opt, held, zero=[lost])
    assert counts(opt)["not finite"] == {lost: 1}
    assert "no descent" not in counts(opt)
    monkeypatch.setattr(Bend, "factor", 1.0)
    opt.step(closure_of(opt, model, data[3]))
    assert not torch.equal(weights(model), before)


@both
@on_both_paths
def test_a_solution_uphill_of_its_model(blocks):
    case = CASES["mlp"]()
    opt = make_for(case, blocks, max_cg=1, momentum=0.9)
    for batch in case.batches[:2]:
        step(opt, case, batch)
    before = weights(case.model)
    opt.state[case.model[2].weight]["solution"].fill_(1e3)
    held = solutions(opt)
    step(opt, case, case.batches[2])
    assert torch.equal(weights(case.model), before)
    wrong = "model" if blocks is None else "2"
    check_kept(opt, held, zero=[wrong])
    assert counts(opt)["no descent"] == {wrong: 1}
    assert "not finite" not in counts(opt)
    step(opt, case, case.batches[2])
    assert counts(opt)["steps"] == {part.name: 3 for part in opt.parts}
    assert not torch.equal(weights(case.model), before)


@both
@on_both_paths
def test_without_positive_curvature_a_block_ends_with_what_it_has(blocks, monkeypatch):
    model, data = Between(), batches(3)
    opt = make(model, blocks, momentum=0.0)
    opt.step(closure_of(opt, model, data[0]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    monkeypatch.setattr(Bend, "factor", -1e6)
    opt.step(closure_of(opt, model, data[1]))
    still = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    first = {"first.weight", "first.bias"}
    assert still == (set(before) if blocks is None else first)
    assert counts(opt)["no curvature"] == {"model" if blocks is None else "first": 1}
    assert "skipped" not in counts(opt)


@both
@on_both_paths
@pytest.mark.parametrize("max_cg", [1, 30])
def test_a_solution_that_overflows(blocks, max_cg):
    """Saturated units: a gradient without curvature, over a damping close to nothing."""
    model = nn.Linear(3, 2)
    nn.init.constant_(model.bias, 1e3)
    opt = make(model, blocks, damping=1e-310, max_cg=max_cg, curvature_batch=4)
    before, x = weights(model), torch.randn(4, 3)
    closure = closure_of(opt, model, (x, torch.zeros(4, 2)), CASES["mlp"]().loss)
    opt.step(closure)
    assert torch.equal(weights(model), before)
    name = opt.parts[0].name
    assert counts(opt) == {"skipped": {name: 1}, "not finite": {name: 1}}
    assert all(torch.isfinite(d).all() for d in solutions(opt).values())


@both
@pytest.mark.usefixtures("unpreconditioned")
def test_nothing_is_learned_from_a_step_left_out(blocks, monkeypatch):
    model, data, calls = Between(), batches(3), []
    opt = make(model, blocks, method=optim.MartensHessianFree)
    opt.step(closure_of(opt, model, data[0]))
    before, factor = weights(model), opt.factor.clone()
    monkeypatch.setattr(Bend, "factor", BAD["nan"])
    model.register_forward_hook(lambda *_: calls.append(1))
    opt.step(closure_of(opt, model, data[1]))
    assert torch.equal(weights(model), before)
    assert torch.equal(opt.factor, factor)
    assert len(calls) == 2  # the closure's and the curvature batch's


@both
def test_three_in_a_row_are_an_error_that_recovery_forgets(blocks, masked):
    case = CASES["mlp"]()
    opt, weight = make_for(case, blocks), case.model[2].weight

    def fail(times):
        for _ in range(times):
            opt.step(spoiling(opt, case, case.batches[0], weight, BAD["nan"]))

    for batch in case.batches[1:4]:
        fail(2)
        step(opt, case, batch)
    before = weights(case.model)
    with pytest.raises(
        RuntimeError, match=r"3 steps in a row were skipped.*raise the damping or max"
    ):
        fail(3 + masked)  # a GPU's verdict comes with the next step, which is not begun
    assert torch.equal(weights(case.model), before)
    assert opt.param_groups[0]["step"] == 12
    assert int(opt.state_dict()["failures"]) == 3
    step(opt, case, case.batches[4])
    assert opt.param_groups[0]["step"] == 13
    assert int(opt.state_dict()["failures"]) == 0
    assert not torch.equal(weights(case.model), before)
