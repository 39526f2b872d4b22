"""What preconditioner() shows is what a step applies, on every kind of layer."""

import copy

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from kronscope import optim
from tests.optim.cases import (
    APART,
    LEARNS_LATE,
    MAKE,
    RECIPES,
    closure_of,
    count,
    dense,
    make_for,
    owned,
    same,
    statistics,
    train_on,
    unclipped,
    vector,
)
from tests.optim.models import CASES, NAMES

every = pytest.mark.parametrize("kind", sorted(MAKE))
on_all = pytest.mark.parametrize("name", NAMES)


def test_nothing_is_missing():
    exported = {name for name in optim.__all__ if isinstance(getattr(optim, name), type)}
    methods = {name for name in exported if issubclass(getattr(optim, name), torch.optim.Optimizer)}
    assert methods - APART == {RECIPES[kind].method for kind in MAKE}
    assert len(MAKE) >= 18  # raise it as the zoo grows
    assert len(CASES) >= 3


def expected_step(opt, model, P, name):
    """-lr P g of a block, from the gradient that the step left."""
    return -opt.param_groups[0]["lr"] * P[name] @ vector(model, name, lambda p: p.grad)


def kept(opt):
    """The share of -lr P M that the step is, by what the optimizer says."""
    if hasattr(opt, "rescaling"):
        return opt.rescaling["alpha"].item()
    ratio, limit = getattr(opt, "curvature_ratio", None), opt.defaults.get("curvature_limit")
    return 1.0 if ratio is None else min(1.0, limit / max(ratio.item(), limit))


def check_step(opt, case, batch, *, P=None, closure=None):
    """One step is -lr P grad for every block; P is read after it, unless given."""
    old = copy.deepcopy(case.model)
    opt.step(closure or closure_of(opt, case.model, batch, case.loss))
    P = P or dense(opt)
    for name in P:
        before, after = (vector(model, name, lambda p: p) for model in (old, case.model))
        # rounding of a step added to weights of size one
        torch.testing.assert_close(
            after - before,
            kept(opt) * expected_step(opt, case.model, P, name),
            rtol=1e-8,
            atol=1e-13,
        )


@every
@on_all
def test_a_frozen_step_is_minus_lr_p_grad(kind, name):
    case = CASES[name]()
    opt = make_for(kind, case, momentum=0.0, **unclipped(kind))
    train_on(opt, case, case.batches[:4])
    everything = {p for block in opt.preconditioner() for p in owned(case.model, block)}
    assert everything == set(case.model.parameters())
    held = statistics(opt)
    with opt.frozen():
        P = dense(opt)
        for batch in case.batches[4:6]:
            check_step(opt, case, batch, P=P)
        assert all(torch.equal(P[n], Q) for n, Q in dense(opt).items())
    assert same(held, statistics(opt))
    train_on(opt, case, case.batches[6:7])
    assert not same(held, statistics(opt))


@every
@on_all
def test_any_step_is_minus_lr_p_grad(kind, name):
    case = CASES[name]()
    opt = make_for(kind, case, momentum=0.0, **unclipped(kind))
    for batch in case.batches[:7]:
        # K-BFGS learns after it has moved, the others before
        P = dense(opt) if kind in LEARNS_LATE and opt.state else None
        if kind in LEARNS_LATE and P is None:
            train_on(opt, case, [batch])
        else:
            check_step(opt, case, batch, P=P)


@every
def test_preconditioners_are_symmetric_and_positive(kind):
    case = CASES["cnn"]()
    opt = make_for(kind, case)
    train_on(opt, case, case.batches[:6])
    for P in dense(opt).values():
        # entries of size 1/damping at most, sums of fewer than a hundred terms
        torch.testing.assert_close(P, P.T, rtol=1e-10, atol=1e-12)
        assert torch.linalg.eigvalsh(P)[0] > 0


@every
def test_gradients_clipped_before_the_step_are_what_it_takes(kind):
    case = CASES["mlp"]()
    opt = make_for(kind, case, momentum=0.0, **unclipped(kind))
    train_on(opt, case, case.batches[:2])
    norms = []

    def clipped(batch):
        def closure():
            loss = closure_of(opt, case.model, batch, case.loss)()
            norms.append(float(clip_grad_norm_(case.model.parameters(), 1e-2)))
            return loss

        return closure

    opt.step(clipped(case.batches[2]))
    last = len(norms)
    with opt.frozen():
        check_step(opt, case, None, P=dense(opt), closure=clipped(case.batches[3]))
    grads = torch.cat([p.grad.reshape(-1) for p in case.model.parameters()])
    assert max(norms[last:]) > 0.02
    torch.testing.assert_close(grads.norm(), torch.tensor(1e-2), rtol=1e-3, atol=0)  # + 1e-6
    for name in opt.preconditioner():
        assert count(opt, owned(case.model, name)[0], "not finite") == 0
