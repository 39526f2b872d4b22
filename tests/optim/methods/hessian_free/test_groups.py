"""Parameter groups, schedulers of both rates and clipped gradients, by HessianFree."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import ExponentialLR, LambdaLR

from kronscope import optim
from tests.optim.cases import closure_of, weights
from tests.optim.methods.hessian_free.cases import (
    both,
    conjugate_gradients,
    dense_ggn,
    flat,
    make_for,
    places,
    solutions,
    step,
)
from tests.optim.models import CASES


@both
def test_learning_rate_schedulers(blocks):
    case = CASES["mlp"]()
    opt = make_for(case, blocks, weight_decay=0.01, decoupled_weight_decay=True)
    schedule = LambdaLR(opt, lambda epoch: 0.0 if epoch == 1 else 1.0)
    step(opt, case, case.batches[0])
    schedule.step()
    before, held = weights(case.model), solutions(opt)
    step(opt, case, case.batches[1])
    assert torch.equal(weights(case.model), before)
    assert all(not torch.equal(d, held[block]) for block, d in solutions(opt).items())
    schedule.step()
    step(opt, case, case.batches[2])
    assert not torch.equal(weights(case.model), before)


@both
def test_schedulers_of_the_damping(blocks):
    """At lr=0 it alone tells two runs apart."""
    found = []
    for scheduled in (True, False):
        case = CASES["mlp"]()
        opt = make_for(case, blocks, lr=0.0, momentum=0.0, damping=2.0 if scheduled else 0.5)
        schedule = ExponentialLR(optim.Damping(opt), 0.5)
        for batch in case.batches[:3]:
            step(opt, case, batch)
            if scheduled:
                schedule.step()
        found.append(solutions(opt))
        assert opt.param_groups[0]["damping"] == (0.25 if scheduled else 0.5)
    for block, d in found[0].items():
        assert torch.equal(d, found[1][block])


@both
@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_settings_by_group(name, blocks, decoupled):
    """Each parameter's own lr, damping, momentum and weight decay, within one block too."""
    case = CASES[name]()
    model = case.model
    own = [
        {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.0, "decoupled_weight_decay": decoupled},
        {"lr": 0.9, "damping": 1.7, "momentum": 0.2},
    ]
    members = [next(model.parameters())], [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": p, **s} for p, s in zip(members, own, strict=True)]
    opt = make_for(
        case, blocks, curvature_batch=8, weight_decay=0.05, groups=groups, max_cg=4
    )  # fmt: skip
    group_of = {p: group for group in opt.param_groups for p in group["params"]}

    def each(key):
        return flat([torch.full_like(p, float(group_of[p][key])) for p in model.parameters()])

    lr, damping, momentum, tau, cut = (
        each(k) for k in ("lr", "damping", "momentum", "weight_decay", "decoupled_weight_decay")
    )
    assert cut.sum() == decoupled * members[0][0].numel()
    last = torch.zeros_like(lr)
    for batch in case.batches[:3]:
        theta, G = weights(model), dense_ggn(case, batch[0])
        step(opt, case, batch)
        g = flat([p.grad for p in model.parameters()]) + (1 - cut) * tau * theta
        A = G + torch.diag(damping + (1 - cut) * tau)
        for part in opt.parts:
            at = places(model, part)
            found, _ = conjugate_gradients(A[at][:, at], -g[at], momentum[at] * last[at], 4)
            last[at] = found[-1]
        # rounding of some hundred terms of order one
        torch.testing.assert_close(
            weights(model), (1 - cut * lr * tau) * theta + lr * last, rtol=0, atol=1e-10
        )


@both
def test_a_group_added_later(blocks):
    case = CASES["mlp"]()
    late = case.model[4].requires_grad_(False)
    opt = make_for(case, blocks)
    for batch in case.batches[:2]:
        step(opt, case, batch)
    still, held = late.weight.clone(), solutions(opt)
    late.requires_grad_(True)
    before = len(opt.param_groups), [part.name for part in opt.parts]
    stranger = nn.Parameter(torch.ones(2))
    for wrong, said in (
        ({"params": [stranger]}, "1 parameters of the groups are not in Sequential"),
        ({"params": [late.weight], "damping": -1}, "damping must be a positive number, got -1"),
        ({"params": [late.weight], "max_cg": 7}, r"\['max_cg'\] cannot differ between groups"),
    ):
        with pytest.raises(ValueError, match=said):
            opt.add_param_group(wrong)
        assert (len(opt.param_groups), [part.name for part in opt.parts]) == before
    opt.add_param_group({"params": list(late.parameters()), "lr": 0.2})
    now = flat(solutions(opt).values())
    assert torch.equal(now, flat(held.values()))
    step(opt, case, case.batches[2])
    assert {group["step"] for group in opt.param_groups} == {3}
    assert not torch.equal(late.weight, still)
    named = {p for part in opt.parts for p in part.parameters}
    assert named == set(case.model.parameters())
    with pytest.raises(ValueError, match="group"):
        make_for(case, blocks).load_state_dict(opt.state_dict())


def test_groups_that_cannot_be():
    case = CASES["mlp"]()
    own = [case.model[0].weight]
    with pytest.raises(ValueError, match="two of the groups"):
        make_for(case, groups=[{"params": own}, {"params": own}])
    with pytest.raises(ValueError, match=r"\['curvature_batch'\] cannot differ between groups"):
        make_for(case, groups=[{"params": own, "curvature_batch": 3}])


@both
def test_gradients_clipped_in_the_closure_are_what_it_takes(blocks):
    case = CASES["mlp"]()
    opt = make_for(case, blocks, curvature_batch=8, max_cg=300, lr=1.0)
    theta, G = weights(case.model), dense_ggn(case, case.batches[0][0])

    def closure():
        loss = closure_of(opt, case.model, case.batches[0], case.loss)()
        assert clip_grad_norm_(case.model.parameters(), 1e-2) > 0.02
        return loss

    opt.step(closure)
    g = flat([p.grad for p in case.model.parameters()])
    for part in opt.parts:
        at = places(case.model, part)
        A = G[at][:, at] + 0.3 * torch.eye(len(at))
        torch.testing.assert_close(
            weights(case.model)[at], theta[at] - torch.linalg.solve(A, g[at]), rtol=0, atol=1e-9
        )
