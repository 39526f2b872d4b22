"""Statistics follow .grad, whatever else a loop does between forward, backward and step."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu

from kronscope.optim import KFAC, TKFAC, HessianFree, KBFGSLimited
from tests.optim.cases import (
    CLOSURE,
    MAKE,
    OF_GRADIENTS,
    OF_PARAMETERS,
    each,
    is_sampled,
    make_for,
    weights,
)
from tests.optim.models import CASES

every = pytest.mark.parametrize("kind", each(MAKE))
one_pass = pytest.mark.parametrize("kind", each(set(MAKE) - CLOSURE))
watching = pytest.mark.parametrize("kind", each(set(MAKE) - OF_GRADIENTS))


def steps(kind, backwards, case_name="mlp", *, set_to_none=True):
    """The weights after three steps; backwards(opt, case, batch) leaves the gradient."""
    case = CASES[case_name]()
    opt = make_for(kind, case)
    for batch in case.batches[:3]:

        def closure(batch=batch):
            opt.zero_grad(set_to_none)
            return backwards(opt, case, batch)

        opt.step(closure)
    return weights(case.model)


def plain(_, case, batch):
    loss = case.loss(case.model, batch)
    loss.backward()
    return loss.detach()


@one_pass
def test_what_autograd_grad_looks_at_is_not_counted(kind):
    """Adversarial training with gradients kept as zeros, by which nothing is seen to be cleared."""

    def adversarial(opt, case, batch, *, look=True):
        x, t = batch[0].clone().requires_grad_(), batch[1]
        if look:
            torch.autograd.grad(case.loss(case.model, (x, t)), x)
        return plain(opt, case, (x.detach() + 0.1, t))

    def without(opt, case, batch):
        labels = opt._harness.labels  # as many are drawn with the look as without
        if labels is not None:
            with torch.enable_grad():
                case.model(batch[0])
        return adversarial(opt, case, batch, look=False)

    with_a_look, plainly = (steps(kind, b, set_to_none=False) for b in (adversarial, without))
    assert torch.equal(with_a_look, plainly)


@one_pass
def test_a_batch_given_up_by_the_model_does_not_count(kind):
    def given_up(opt, case, batch, *, to_none):
        plain(opt, case, case.batches[-1])
        case.model.zero_grad(set_to_none=to_none)  # not the optimizer's own
        return plain(opt, case, batch)

    by_none, by_zeros = (
        steps(kind, lambda *a, n=n: given_up(*a, to_none=n)) for n in (True, False)
    )
    assert torch.equal(by_none, by_zeros)


@one_pass
def test_gradients_clipped_between_micro_batches_are_not_taken_for_cleared(kind):
    """In-place work on .grad that leaves values there gives up nothing."""

    def two(_, case, batch, *, write):
        x, t = batch
        half = len(x) // 2
        for part in (slice(half), slice(half, None)):
            (case.loss(case.model, (x[part], t[part])) / 2).backward()
            if write:
                for p in case.model.parameters():
                    p.grad.mul_(1.0)
        return torch.zeros(())

    touched, left = (steps(kind, lambda *a, w=w: two(*a, write=w)) for w in (True, False))
    assert torch.equal(touched, left)


@one_pass
def test_a_gradient_penalty(kind):
    """Of the gradient with respect to the inputs; its own graph is no second batch."""

    def penalised(_, case, batch):
        x = batch[0].clone().requires_grad_()
        loss = case.loss(case.model, (x, batch[1]))
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = loss + 0.1 * g.square().sum()
        loss.backward()
        return loss.detach()

    assert torch.isfinite(steps(kind, penalised)).all()


@one_pass
def test_a_look_at_the_gradients_of_the_parameters(kind):
    def looked(_, case, batch):
        loss = case.loss(case.model, batch)
        torch.autograd.grad(loss, list(case.model.parameters()), retain_graph=True)
        loss.backward()
        return loss.detach()

    assert torch.equal(steps(kind, looked), steps(kind, plain))


@watching
def test_a_second_backward_after_clearing_is_refused(kind):
    def twice(opt, case, batch):
        loss = case.loss(case.model, batch)
        loss.backward(retain_graph=True)
        opt.zero_grad()
        loss.backward()
        return loss.detach()

    words = "two backwards through one forward|back-propagated twice|no label was"
    with pytest.raises(ValueError, match=words):
        steps(kind, twice)


@every
@pytest.mark.parametrize("case_name", ["mlp", "cnn"])
def test_micro_batches_in_one_buffer(kind, case_name):
    """A loader's static memory is filled anew between backward and step."""

    def halves(_, case, batch, *, buffers):
        for k in range(2):
            own = [v[k * len(v) // 2 : (k + 1) * len(v) // 2] for v in batch]
            if buffers is not None:
                own = [b.copy_(v) for b, v in zip(buffers, own, strict=True)]
            (case.loss(case.model, own) / 2).backward()
        return torch.zeros(())

    batch = CASES[case_name]().batches[0]
    buffers = [torch.empty_like(v[: len(v) // 2]) for v in batch]
    reused, fresh = (
        steps(kind, lambda *a, b=b: halves(*a, buffers=b), case_name) for b in (buffers, None)
    )
    assert torch.equal(reused, fresh)


class Residual(nn.Module):
    """A float32 stream of which autocast's layers keep copies: it may be added to in place."""

    def __init__(self, in_place):
        super().__init__()
        self.in_place = in_place
        self.stem, self.branch, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.stem(x).float()
        if self.in_place:
            h += self.branch(h)
        else:
            h = h + self.branch(h)
        return self.last(h)


@every
def test_a_stream_added_to_in_place_under_autocast(kind):
    results = []
    for in_place in (True, False):
        torch.manual_seed(0)
        model = Residual(in_place).float()
        opt = MAKE[kind](model)
        for x in torch.rand(3, 12, 6, generator=torch.Generator().manual_seed(1)).float():

            def closure(x=x, opt=opt, model=model):
                opt.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    z = model(x)
                loss = nn.functional.binary_cross_entropy_with_logits(z, x, reduction="sum")
                (loss / len(x)).backward()
                return loss.detach() / len(x)

            opt.step(closure)
        results.append(weights(model))
    assert torch.equal(*results)


def test_an_input_changed_before_backward_is_refused():
    """Where autograd has a copy and lets it pass, the statistics would be of the changed one."""
    case = CASES["mlp"]()
    opt = make_for("kfac", case)
    x, t = case.batches[0]
    x = x.clone()
    with save_on_cpu():
        loss = case.loss(case.model, (x, t))
    x.mul_(2)
    with pytest.raises(ValueError, match="input of layer '0' was changed in place"):
        loss.backward()
    del opt


class Twins(nn.Module):
    """A layer called twice in a forward, of which the first call does not lead to the loss."""

    def __init__(self, stop):
        super().__init__()
        self.stop = stop
        self.cell, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        if self.stop == "detach":
            target = self.cell(x + 1).detach()
        else:
            with torch.no_grad():
                target = self.cell(x + 1)
        return self.out(torch.tanh(self.cell(x))) + target[:, :2]


@every
def test_a_call_that_does_not_lead_to_the_loss(kind):
    results = []
    for stop in ("detach", "no_grad"):
        torch.manual_seed(0)
        model = Twins(stop).double()
        settings = {"likelihood": "gaussian"} if is_sampled(kind) else {}
        opt = MAKE[kind](model, **settings)
        x = torch.randn(10, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        for _ in range(3):

            def closure(opt=opt, model=model, x=x):
                opt.zero_grad()
                loss = 0.5 * (model(x) - x[:, :2]).square().sum() / len(x)
                loss.backward()
                return loss.detach()

            opt.step(closure)
        results.append(weights(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("kind", each(set(MAKE) - OF_PARAMETERS - OF_GRADIENTS))
def test_an_empty_batch_is_refused(kind):
    case = CASES["mlp"]()
    opt = make_for(kind, case)
    empty = [v[:0] for v in case.batches[0]]

    def closure():
        opt.zero_grad()
        loss = 0.0 * case.model(empty[0]).sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"layer '0' got an empty batch, \[0, "):
        opt.step(closure)


class Normalising(nn.Module):
    """Writes into what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.tanh(self.layer(x.sub_(1.0).mul_(2.0)))


@pytest.mark.parametrize("curvature_batch", [5, 10])
def test_hessian_free_with_a_model_that_writes_into_its_input(curvature_batch):
    results = []
    data = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    for ready in (False, True):
        torch.manual_seed(0)
        model = Normalising()
        net = nn.Sequential(model.layer, nn.Tanh()) if ready else model
        torch.manual_seed(0)
        opt = HessianFree(net, likelihood="gaussian", damping=0.3, curvature_batch=curvature_batch)
        for _ in range(3):

            def closure(opt=opt, net=net, ready=ready):
                opt.zero_grad()
                x = (data - 1.0) * 2.0 if ready else data.clone()
                loss = 0.5 * (net(x) - 0.1).square().sum() / len(x)
                loss.backward()
                return loss.detach()

            opt.step(closure)
        results.append(weights(model))
    assert torch.equal(*results)


def test_the_curvature_limit_where_no_layer_is_used():
    """Without a second pass nothing is known of the step, and nothing is shortened."""
    model = nn.Sequential(nn.Linear(2, 1))
    model.register_parameter("w", nn.Parameter(torch.ones(2)))
    opt = KBFGSLimited(model, lr=0.3, curvature_limit=0.1)

    def closure():
        opt.zero_grad()
        loss = model.w.sum()
        loss.backward()
        return loss

    opt.step(closure)
    torch.testing.assert_close(model.w, torch.full((2,), 1 - 0.3 * 0.1))  # M = 0.1 ∇
    assert opt.curvature_ratio is None


def test_examples_of_the_call_that_counts():
    torch.manual_seed(0)
    model = Twins("detach")
    opt = TKFAC(model, likelihood="empirical")
    x = torch.randn(10, 4)
    (0.5 * (model(x) - x[:, :2]).square().sum() / len(x)).backward()
    assert opt._harness.capture.totals["cell"].examples == 10
    opt.step()
    assert opt.state[model.cell.weight]["L"].diagonal().sum() > 0


def test_kfac_of_frozen_steps_holds_no_batch():
    """What backward brings to a layer whose weight is frozen for a while is let go."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    opt = KFAC(model, lr=0.1)
    model[0].requires_grad_(False)
    x = torch.randn(5, 3, requires_grad=True)
    model(x).sum().backward()
    opt.step()
    assert not opt._harness.capture._delivered
