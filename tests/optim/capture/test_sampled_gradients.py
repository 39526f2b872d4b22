"""Sampled gradients follow .grad: what counts, what does not, and errors."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from kronscope.optim import KFAC
from kronscope.optim.methods.tnt.tnt import TNT
from tests.optim.models import CASES as MODELS


def by_example(z):
    """A score that depends on the example only, so that any split gets the same labels."""
    return torch.sin(3 * z + 1)


def setup(case="cnn", **settings):
    made = MODELS[case]()
    opt = TNT(made.model, likelihood=made.likelihood, **{"lr": 0.02, "damping": 0.6, **settings})
    opt._harness.capture.sample = by_example
    return made, opt


def gathered(opt):
    """{name: mean gradient} that the next step would learn from."""
    return {n: t.means["gradient"] for n, t in opt._harness.capture.totals.items()}


def sampled(model, x):
    """The same by hand, on a copy that counts for nobody."""
    model = copy.deepcopy(model)
    z = model(x)
    grads = torch.autograd.grad(z, list(model.parameters()), by_example(z.detach()) / len(x))
    return dict(zip(dict(model.named_parameters()), grads, strict=True))


def compare(found, right):
    assert found.keys() == right.keys()
    for name in right:
        torch.testing.assert_close(found[name], right[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", sorted(MODELS))
def test_mean_over_the_batch_however_it_is_cut(case):
    made, opt = setup(case)
    x, t = made.batches[0]
    right = sampled(made.model, x)
    for cut in ([8], [4, 4], [1, 5, 2]):
        opt.zero_grad()
        for xs, ts in zip(x.split(cut), t.split(cut), strict=True):
            (made.loss(made.model, (xs, ts)) * len(xs) / 8).backward()
        compare(gathered(opt), right)


def test_only_what_backward_reached_counts():
    made, opt = setup()
    (first, t), (second, u) = made.batches[:2]
    made.loss(made.model, (first, t))
    assert not gathered(opt)
    with torch.no_grad():
        made.model(first)
    made.loss(made.model, (second, u)).backward()
    compare(gathered(opt), sampled(made.model, second))
    opt.zero_grad()
    assert not gathered(opt)


def test_zero_grad_of_the_model_is_noticed():
    made, opt = setup()
    made.loss(made.model, made.batches[0]).backward()
    made.model.zero_grad()
    made.loss(made.model, made.batches[1]).backward()
    compare(gathered(opt), sampled(made.model, made.batches[1][0]))


def test_a_graph_counts_once_and_keeps_no_gradients():
    made, opt = setup()
    loss = made.loss(made.model, made.batches[0])
    loss.backward(retain_graph=True)
    first = {n: g.clone() for n, g in gathered(opt).items()}
    loss.backward()
    compare(gathered(opt), first)


def test_two_calls_before_one_backward_are_one_batch():
    made, opt = setup("mlp")
    (x, t), (y, u) = made.batches[:2]
    (0.5 * made.loss(made.model, (x, t)) + 0.5 * made.loss(made.model, (y, u))).backward()
    compare(gathered(opt), sampled(made.model, torch.cat([x, y])))


class Gate(nn.Module):
    """The second layer is used for positive inputs only."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        z = self.first(x)
        return z + self.second(x) if bool(x[0, 0] > 0) else z


def test_micro_batches_that_leave_a_parameter_out_count_as_zero():
    model = Gate()
    opt = TNT(model, likelihood="gaussian")
    opt._harness.capture.sample = by_example
    x = torch.randn(4, 3)
    x[:, 0] = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    for piece in (x[:2], x[2:]):
        (model(piece).square().sum() / 4).backward()
    right = sampled(model, x[2:])["second.weight"] / 2
    torch.testing.assert_close(gathered(opt)["second.weight"], right)


def test_drawn_on_update_steps_only():
    made, opt = setup("mlp", update_every=3)
    drawn = []
    opt._harness.capture.sample = lambda z: (drawn.append(len(z)), by_example(z))[1]
    for k, batch in enumerate(made.batches[:5]):
        opt.zero_grad()
        made.loss(made.model, batch).backward()
        opt.step()
        assert len(drawn) == 1 + k // 3
    made.model(made.batches[0][0])
    with opt.frozen():
        made.model(made.batches[0][0])
    assert len(drawn) == 2


def test_other_optimizers_on_the_model_do_not_disturb():
    made, opt = setup("mlp")
    other = KFAC(made.model)
    made.loss(made.model, made.batches[0]).backward()
    assert {t.examples for t in other._harness.capture.totals.values()} == {8}
    assert {t.examples for t in opt._harness.capture.totals.values()} == {8}
    compare(gathered(opt), sampled(made.model, made.batches[0][0]))


def test_copies_are_free_and_the_optimizer_too():
    made, opt = setup("mlp")
    twin = copy.deepcopy(made.model)
    made.loss(twin, made.batches[0]).backward()
    assert not gathered(opt)
    gone = weakref.ref(opt._harness.capture)
    del opt
    gc.collect()
    assert gone() is None
    made.loss(made.model, made.batches[0]).backward()


def test_in_place_activation_after_the_model():
    model = nn.Sequential(nn.Linear(3, 2))
    opt = TNT(model, likelihood="gaussian")
    opt._harness.capture.sample = by_example
    x = torch.randn(4, 3)
    right = sampled(model, x)
    model(x).relu_().sum().div(4).backward()
    compare(gathered(opt), right)


def test_errors():
    made, opt = setup("mlp")
    x = made.batches[0][0]
    made.model[0](x).sum().backward()
    with pytest.raises(ValueError, match=r"'0\.weight' .*call the model itself"):
        opt.step()

    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = Two(3, 2)
    TNT(model, likelihood="gaussian")
    with pytest.raises(ValueError, match="must be one tensor; Two returned tuple"):
        model(torch.randn(4, 3))
