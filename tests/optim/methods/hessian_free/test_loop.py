"""What HessianFree owes the training loop: closures, micro-batches, curvature batches."""

import pytest
import torch
from torch import nn

from tests.optim.cases import weights
from tests.optim.methods.hessian_free.cases import (
    both,
    counts,
    every,
    make_for,
    solutions,
    step,
)
from tests.optim.models import CASES


def test_a_closure_is_needed():
    opt = make_for(CASES["mlp"]())
    with pytest.raises(TypeError, match=r"HessianFree .* needs a closure[\s\S]*def closure\(\)"):
        opt.step()


@both
@pytest.mark.parametrize("forget", ["backward", "model"])
def test_a_closure_that_leaves_the_model_out(blocks, forget):
    case = CASES["mlp"]()
    opt, before = make_for(case, blocks), weights(case.model)
    x, _ = case.batches[0]

    def closure():
        opt.zero_grad()
        run = case.model if forget == "backward" else nn.Sequential(*case.model)
        loss = run(x).square().sum()
        return loss if forget == "backward" else (loss.backward(), loss)[1]

    with pytest.raises(ValueError, match="must call the model itself, not its parts, and then"):
        opt.step(closure)
    assert torch.equal(weights(case.model), before)


@every
@pytest.mark.parametrize("curvature_batch", [16, 7])
@pytest.mark.parametrize(("name", "form"), [("mlp", "pieces"), ("shared", "twice")])
def test_micro_batches_equal_the_whole(name, method, blocks, curvature_batch, form):
    """Rows of the curvature batch are drawn over all calls; squares of examples' gradients too."""
    ends, rows = [], []
    for one in ("whole", form):
        torch.manual_seed(4)
        case = CASES[name](m=16)
        opt = make_for(case, blocks, curvature_batch=curvature_batch, method=method)
        for batch in case.batches[:3]:

            def closure(batch=batch, one=one, case=case, opt=opt):
                opt.zero_grad()
                if one == "twice":
                    loss = case.loss(case.model, batch)
                    (0.25 * loss).backward(retain_graph=True)
                    (0.75 * loss).backward()
                    return loss
                total = 0.0
                sizes = [16] if one == "whole" else [4, 2, 9, 1]
                for part in zip(*(values.split(sizes) for values in batch), strict=True):
                    loss = case.loss(case.model, part) * len(part[0]) / 16
                    loss.backward()
                    total += loss.detach()
                return total

            opt.step(closure)
        rows.append(opt.rows)
        ends.append(weights(case.model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)  # sums in another order
    assert (rows[0] is None) == (curvature_batch == 16)
    assert rows[0] is None or torch.equal(*rows)


@pytest.mark.parametrize("wanted", [1, 7, 8, None])
def test_rows_of_the_curvature_batch(wanted):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        case = CASES["mlp"](m=9)
        opt, seen = make_for(case, curvature_batch=wanted), []
        for batch in case.batches[:6]:
            step(opt, case, batch)
            assert torch.equal(opt.rows, opt.rows.unique())  # distinct, ascending
            assert 0 <= opt.rows[0] <= opt.rows[-1] < 9
            assert len(opt.rows) == (3 if wanted is None else wanted)
            seen.append(tuple(opt.rows.tolist()))
        assert len(set(seen)) > 2
        drawn.append(seen)
    assert drawn[0] == drawn[1] != drawn[2]


@both
def test_a_batch_smaller_than_the_curvature_batch(blocks):
    case = CASES["mlp"]()
    opt = make_for(case, blocks, curvature_batch=6)
    step(opt, case, case.batches[0])
    before, small = weights(case.model), tuple(values[:5] for values in case.batches[1])
    with pytest.raises(
        ValueError, match=r"is 6, but the batch has only 5 examples.*drop_last=True"
    ):
        step(opt, case, small)
    assert torch.equal(weights(case.model), before)
    step(opt, case, tuple(values[:6] for values in case.batches[1]))
    assert opt.rows is None  # all of them


def test_a_grad_scaler_is_refused():
    case = CASES["mlp"]()
    opt = make_for(case)
    opt.found_inf = torch.zeros(())  # as GradScaler.step tells an optimizer
    with pytest.raises(ValueError, match=r"HessianFree .* train in bfloat16"):
        step(opt, case, case.batches[0])


@every
def test_bfloat16_autocast(method, blocks):
    case = CASES["cnn"](count=1, m=16)
    case.model.float()
    x, t = case.batches[0][0].float(), case.batches[0][1]
    opt = make_for(case, blocks, curvature_batch=16, damping=1.0, method=method)
    losses = []
    for _ in range(12):

        def closure():
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = case.loss(case.model, (x, t))
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    assert losses[-1] < 0.95 * losses[0]
    assert {d.dtype for d in solutions(opt).values()} == {torch.float32}
    assert {p.dtype for p in case.model.parameters()} == {torch.float32}
    assert counts(opt) == {"steps": {part.name: 12 for part in opt.parts}}
