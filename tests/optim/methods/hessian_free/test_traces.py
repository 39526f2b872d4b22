"""What HessianFree leaves behind: nothing but the step, in buffers, generators and memory."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from kronscope.optim import MartensHessianFree
from tests.optim.cases import autoencoder, batches, closure_of, loss_of, weights
from tests.optim.methods.hessian_free.cases import (
    Between,
    both,
    every,
    make,
)


def train(opt, model, data):
    return [opt.step(closure_of(opt, model, x)).item() for x in data]


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 6)
    )


@every
@pytest.mark.usefixtures("unpreconditioned")
def test_its_own_passes_leave_no_trace(method, blocks):
    """Buffers, random numbers and .grad are those of the closure's own pass."""
    model, twin, x = network(), network(), batches(1)[0]
    opt = make(model, blocks, method=method)
    after = []
    for net, run in ((model, opt.step), (twin, lambda closure: closure())):
        torch.manual_seed(5)

        def closure(net=net):
            net.zero_grad(set_to_none=False)
            loss = loss_of(net, x)
            loss.backward()
            return loss

        run(closure)
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    assert len(list(model.buffers())) == 3
    for own, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@every
@pytest.mark.usefixtures("unpreconditioned")
def test_dropout_masks_are_those_of_the_closure(method, blocks):
    """In all of its passes, also while routes are tried."""
    model, x, seen = autoencoder(activation=lambda: nn.Dropout(0.5)), batches(1)[0], []
    opt = make(model, blocks, curvature_batch=16, method=method)
    model[1].register_forward_hook(lambda _m, _i, out: seen.append(out == 0))
    for least in (3, 2):
        seen.clear()
        train(opt, model, [x])
        assert len(seen) >= least + (method is MartensHessianFree)
        assert all(torch.equal(seen[0], mask) for mask in seen)


@both
def test_forwards_that_are_not_the_losses_count_for_nothing(blocks):
    ends = []
    for more in (False, True):
        torch.manual_seed(0)
        model, data = autoencoder(), batches(4)
        opt = make(model, blocks, curvature_batch=None)
        for x in data:

            def closure(x=x, model=model, opt=opt, more=more):
                opt.zero_grad()
                if more:
                    model(x[:3])
                    with torch.no_grad():
                        model(x)
                loss = loss_of(model, x)
                loss.backward()
                return loss

            opt.step(closure)
            assert len(opt.rows) == 4
        ends.append(weights(model))
    assert torch.equal(*ends)


@every
def test_batches_do_not_outlive_the_step(method, blocks):
    """Of a kept loss's graph only autograd's own part stays."""
    model, x = autoencoder(), batches(1)[0].clone()
    opt = make(model, blocks, method=method)
    losses = [opt.step(closure_of(opt, model, x)) for _ in range(2)]
    gone = weakref.ref(x)
    opt.zero_grad()
    del losses
    del x
    gc.collect()
    assert gone() is None


def test_a_kept_loss_does_not_keep_what_the_optimizer_noted():
    model = Between(lambda h: h * 1.0)
    opt, extra = make(model), torch.ones(16)
    forward = model.forward
    model.forward = lambda x, _: forward(x)

    def closure(extra=extra):
        opt.zero_grad()
        loss = model(batches(1)[0], extra).square().sum()
        loss.backward()
        return loss

    loss, gone = opt.step(closure), weakref.ref(extra)
    del closure, extra
    gc.collect()
    assert gone() is None
    assert loss.grad_fn is not None


def test_nothing_outlives_the_optimizer():
    model = autoencoder()
    opt = make(model, [])
    train(opt, model, batches(2))
    assert not model._forward_hooks
    gone = weakref.ref(opt)
    del opt
    gc.collect()
    assert gone() is None


@both
def test_copies_of_the_model_are_free_of_the_optimizer(blocks):
    model, data = autoencoder(), batches(6)
    average, opt = AveragedModel(model), make(model, blocks)
    path = []
    for x in data:
        train(opt, model, [x])
        average.update_parameters(model)
        path.append(weights(model))
    mean = torch.cat([p.detach().view(-1) for p in average.module.parameters()])
    torch.testing.assert_close(mean, torch.stack(path).mean(0), rtol=1e-12, atol=1e-13)
    assert loss_of(average, data[0]) > 0
    calls = weights(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(twin, data[0]).backward()
        other = make(twin, blocks)
        train(other, twin, data[:1])
    assert torch.equal(weights(model), calls)
    assert opt.param_groups[0]["step"] == 6
