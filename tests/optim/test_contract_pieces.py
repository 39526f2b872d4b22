"""Micro-batches add up to the batch; autocast and GradScaler leave the numbers as they are."""

import copy

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from tests.optim.cases import (
    CLOSURE,
    MAKE,
    count,
    each,
    is_sampled,
    make_for,
    same,
    state_of,
    train_on,
    weights,
)
from tests.optim.models import CASES

# eigenvectors of equal eigenvalues are any; what they make of a step is compared by the weights
IN_A_BASIS = {"U_A", "U_G", "S"}

every = pytest.mark.parametrize("kind", each(MAKE))
one_pass = pytest.mark.parametrize("kind", each(set(MAKE) - CLOSURE))


def same_labels(opt):
    """Scores that depend on the example alone, in place of sampled ones, however it is batched."""
    assert opt._harness.capture.sample is not None
    opt._harness.capture.sample = lambda output: torch.sin(5 * output)


@every
@pytest.mark.parametrize(
    ("name", "sizes"), [("mlp", [4, 4]), ("cnn", [1, 5, 2]), ("shared", [3, 5])]
)
def test_batches_in_pieces_equal_the_whole(kind, name, sizes):
    pair = []
    for pieces in ([8], sizes):
        case = CASES[name]()
        opt = make_for(kind, case)
        if is_sampled(kind):
            same_labels(opt)
        for batch in case.batches[:4]:

            def closure(batch=batch, pieces=pieces, case=case, opt=opt):
                opt.zero_grad()
                for part in zip(*(values.split(pieces) for values in batch), strict=True):
                    (case.loss(case.model, part) * len(part[0]) / 8).backward()
                return case.loss(case.model, batch).detach()

            opt.step(closure)
        pair.append((weights(case.model), state_of(opt)))
    (one, held), (other, pieced) = pair
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)  # sums in another order
    for a, b in zip(held, pieced, strict=True):
        assert a.keys() == b.keys()
        assert torch.equal(a["counts"], b["counts"])
        for key in a.keys() - IN_A_BASIS:
            torch.testing.assert_close(a[key], b[key], rtol=1e-9, atol=1e-10)


@every
def test_autocast_trains_with_factors_in_float32(kind):
    case = CASES["cnn"]()
    case.model.float()
    opt = make_for(kind, case)
    losses = []
    for x, t in [(x.float(), t) for x, t in case.batches[:2]] * 10:

        def closure(x=x, t=t):
            opt.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = case.model(x)
            assert output.dtype == torch.bfloat16
            loss = torch.nn.functional.cross_entropy(output.float(), t)
            loss.backward()
            return loss

        losses.append(opt.step(closure).item())
    assert sum(losses[-4:]) < sum(losses[:4])
    for state in state_of(opt):
        for key, value in state.items():
            assert value.dtype in (torch.float32, torch.int64, torch.bool), key
            assert torch.isfinite(value).all()
    for parameter in case.model.parameters():
        assert parameter.dtype == torch.float32
        if "counts" in opt.state[parameter]:
            assert count(opt, parameter, "not finite") == 0


def scaled_steps(opt, case, data, scaler, *, clip, scale):
    """Steps as a user with a GradScaler takes them; scale=False: the same without one."""
    for batch in data:
        opt.zero_grad()
        loss = case.loss(case.model, batch)
        (scaler.scale(loss) if scale else loss).backward()
        if clip:
            if scale:
                scaler.unscale_(opt)
            clip_grad_norm_(case.model.parameters(), 0.05)
        if scale:
            scaler.step(opt)
            scaler.update()
        else:
            opt.step()


def new_scaler():
    # a power of two, so that scaling is exact
    return torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)


@one_pass
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("name", "dtype"), [("cnn", torch.float64), ("shared", torch.float32)])
def test_a_scaled_run_equals_the_unscaled_one(kind, clip, name, dtype):
    results = []
    for scale in (False, True):
        case = CASES[name]()
        case.model.to(dtype)
        data = [
            tuple(v.to(dtype) if v.is_floating_point() else v for v in batch)
            for batch in case.batches[:5]
        ]
        opt, scaler = make_for(kind, case, update_every=2, weight_decay=0.01), new_scaler()
        if clip:
            opt.scaler = scaler
        scaled_steps(opt, case, data, scaler, clip=clip, scale=scale)
        results.append((weights(case.model), state_of(opt)))
        if scale:
            assert scaler.get_scale() == 2.0**13  # it has grown on the way
    (one, held), (other, scaled) = results
    rtol = 1e-4 if dtype == torch.float32 else 1e-10  # rounding, inverses of condition below 1e3
    torch.testing.assert_close(one, other, rtol=rtol, atol=rtol / 100)
    for a, b in zip(held, scaled, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=10 * rtol, atol=rtol / 10)


@one_pass
def test_unscaled_gradients_need_the_scaler_where_captured_ones_are_used(kind):
    case = CASES["mlp"]()
    opt, scaler = make_for(kind, case), new_scaler()
    if opt._harness.delivers:
        with pytest.raises(ValueError, match=r"optimizer.scaler = scaler"):
            scaled_steps(opt, case, case.batches[:1], scaler, clip=True, scale=True)
        opt, scaler = make_for(kind, case), new_scaler()
        opt.scaler = scaler
    scaled_steps(opt, case, case.batches[:1], scaler, clip=True, scale=True)


@one_pass
@pytest.mark.parametrize("clip", [False, True])
def test_an_overflow_changes_nothing(kind, clip):
    case = CASES["cnn"]()
    opt, scaler = make_for(kind, case), new_scaler()
    if clip:
        opt.scaler = scaler
    scaled_steps(opt, case, case.batches[:2], scaler, clip=clip, scale=True)
    before, model = state_of(opt), copy.deepcopy(case.model.state_dict())
    groups = copy.deepcopy(
        [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    )
    old = scaler.get_scale()
    opt.zero_grad()
    scaler.scale(case.loss(case.model, case.batches[2])).backward()
    case.model[0].weight.grad[0, 0] = float("inf")
    if clip:
        scaler.unscale_(opt)
        clip_grad_norm_(case.model.parameters(), 0.05)
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == old / 2
    assert all(torch.equal(v, model[k]) for k, v in case.model.state_dict().items())
    assert same(before, state_of(opt))
    after = [{k: v for k, v in g.items() if k != "params"} for g in opt.param_groups]
    assert after == groups
    scaled_steps(opt, case, case.batches[3:5], scaler, clip=clip, scale=True)
    assert opt.param_groups[0]["step"] == 4
    assert not torch.equal(case.model[0].weight, model["0.weight"])


@pytest.mark.parametrize("kind", each(CLOSURE))
def test_methods_of_two_passes_refuse_a_scaler(kind):
    case = CASES["mlp"]()
    opt, scaler = make_for(kind, case), new_scaler()
    train_on(opt, case, case.batches[:1])
    scaler.scale(case.loss(case.model, case.batches[0])).backward()
    with pytest.raises(ValueError, match="bfloat16"):
        scaler.step(opt, lambda: case.loss(case.model, case.batches[0]))
