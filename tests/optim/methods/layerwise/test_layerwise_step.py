"""LayerwiseStep against dense Hessian blocks and plain loops written from the formula."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kronscope.optim import KBFGS, KFAC
from kronscope.optim.methods.layerwise.layerwise_step import LayerwiseStep
from tests.optim.cases import autoencoder, batches, closure_of, loss_of, train, weights

FREE = 1e9  # a bound that never binds
WRAPPED = {
    "sgd": lambda model, lr=0.1: torch.optim.SGD(model.parameters(), lr),
    "momentum": lambda model, lr=0.1: torch.optim.SGD(
        model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "adam": lambda model, lr=0.1: torch.optim.Adam(model.parameters(), lr),
    "adamw": lambda model, lr=0.1: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1),
    "rmsprop": lambda model, lr=0.1: torch.optim.RMSprop(model.parameters(), lr),
    "kfac": lambda model, lr=0.1: KFAC(model, lr, damping=0.3, refresh_every=2),
    "kbfgs": lambda model, lr=0.1: KBFGS(model, lr),
}
wrapped = pytest.mark.parametrize("kind", sorted(WRAPPED))


def vec(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def dense(model, x, loss=loss_of):
    """Gradient and Hessian of all parameters, and each layer's range of places."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    shapes = [p.shape for p in parameters]
    theta = vec(parameters)

    class Called:
        def __init__(self, flat):
            pieces = flat.split([s.numel() for s in shapes])
            self.own = {n: p.reshape(s) for n, p, s in zip(names, pieces, shapes, strict=True)}

        def __call__(self, x):
            return functional_call(model, self.own, (x,))

    def function(flat):
        return loss(Called(flat), x)

    places, start = {}, 0
    for name, parameter in zip(names, parameters, strict=True):
        layer = name.rpartition(".")[0]
        places.setdefault(layer, []).extend(range(start, start + parameter.numel()))
        start += parameter.numel()
    return torch.func.grad(function)(theta), hessian(function)(theta), places


def direction(kind, model, x):
    """The step of a twin of the wrapped optimizer at lr = 1, negated."""
    twin = copy.deepcopy(model)
    before = weights(twin)
    torch.manual_seed(0)  # sampled labels
    train(WRAPPED[kind](twin, 1.0), twin, [x])
    return before - weights(twin)


@wrapped
def test_alpha_is_that_of_the_dense_block(kind):
    model, x = autoencoder(), batches(1)[0]
    g, H, places = dense(model, x)
    d, before = direction(kind, model, x), weights(model)
    torch.manual_seed(0)
    opt = LayerwiseStep(WRAPPED[kind](model), model, max_step=FREE, max_move=FREE)
    train(opt, model, [x])
    found, Hd = opt.step_sizes(), H @ d
    assert list(found) == ["0", "2", "4", "6"] == list(places)
    for name, own in places.items():
        slope = g[own] @ d[own]
        assert slope > 0
        expected = slope / (d[own] @ H[own][:, own] @ d[own]).abs()
        # d is a difference of parameters near one: 1e-16 of them over 1e-3 of it, squared
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=0)
        torch.testing.assert_close(
            weights(model)[own], before[own] - expected * d[own], rtol=1e-9, atol=1e-12
        )
        joint = slope / (d[own] @ Hd[own]).abs()  # what a joint product would give
        assert abs(joint / expected - 1) > 1e-3


def linear_problem():
    torch.manual_seed(4)
    model = nn.Linear(3, 2)
    x, t = torch.randn(20, 3), torch.randn(20, 2)
    return model, x, lambda model, x: F.mse_loss(model(x), t)


def closure_for(opt, model, x, loss):
    def closure():
        opt.zero_grad()
        value = loss(model, x)
        value.backward()
        return value

    return closure


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_one_layer_takes_the_exact_line_search_step(kind):
    model, x, loss = linear_problem()
    opt = LayerwiseStep(WRAPPED[kind](model), model, decay=0.0)
    for _ in range(5):
        before = weights(model)
        g, H, _ = dense(model, x, loss)
        opt.step(closure_for(opt, model, x, loss))
        move = before - weights(model)
        assert move.norm() > 1e-4
        # at the minimum along the move the new gradient g - H move is orthogonal to it
        assert abs(move @ (g - H @ move)) < 1e-12 * abs(move @ g)


def test_first_step_is_exact_with_averages_too_and_the_rest_are_ratios_of_averages():
    model, x, loss = linear_problem()
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, decay=0.7)
    slopes, curvatures = [], []
    for _ in range(4):
        before = weights(model)
        g, H, _ = dense(model, x, loss)
        slopes.append(g @ g)
        curvatures.append((g @ H @ g).abs())
        opt.step(closure_for(opt, model, x, loss))
        share = [0.7**k for k in reversed(range(len(slopes)))]
        alpha = sum(w * s for w, s in zip(share, slopes, strict=True)) / sum(
            w * c for w, c in zip(share, curvatures, strict=True)
        )
        torch.testing.assert_close(weights(model), before - alpha * g, rtol=1e-10, atol=1e-12)


def test_alpha_is_clipped_and_a_flat_direction_takes_the_bound():
    model, x, loss = linear_problem()
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_step=0.01)
    opt.step(closure_for(opt, model, x, loss))
    assert opt.step_sizes()[""] == 0.01

    def flat(model, x):
        return model(x).sum()

    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_step=3.0)
    before = weights(model)
    opt.step(closure_for(opt, model, x, flat))
    assert opt.step_sizes()[""] == 3.0
    # the gradient of the sum over two outputs and 20 rows, by hand
    expected = torch.cat([x.sum(0), x.sum(0), torch.full((2,), 20.0)])
    torch.testing.assert_close(weights(model), before - 3 * expected)


@wrapped
def test_learning_rate_is_never_used(kind):
    ends = []
    for lr in (1e-3, 10.0):
        torch.manual_seed(0)
        model = autoencoder()
        torch.manual_seed(0)
        opt = LayerwiseStep(WRAPPED[kind](model, lr), model)
        train(opt, model, batches(6))
        ends.append(weights(model))
        assert opt.param_groups[0]["lr"] == lr
        assert not torch.equal(ends[0], weights(autoencoder()))
    assert torch.equal(*ends)


def test_layers_take_turns():
    model, data = autoencoder(), batches(7)
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_move=1e-3)

    def measured():
        return [int(opt.state[model[i].weight]["counts"][:3].sum()) for i in (0, 2, 4, 6)]

    seen = []
    for x in data:
        train(opt, model, [x])
        seen.append(measured())
    assert seen[0] == [1, 1, 1, 1]
    assert seen[1:5] == [[2, 1, 1, 1], [2, 2, 1, 1], [2, 2, 2, 1], [2, 2, 2, 2]]
    opt.layers_per_step = 3
    train(opt, model, data[:2])
    assert measured() == [4, 4, 4, 4]  # two single turns, then 2 4 6 and 0 2 4
    opt.layers_per_step = 99
    train(opt, model, data[:1])
    assert measured() == [5, 5, 5, 5]


@pytest.mark.parametrize("kind", ["momentum", "adam", "kfac"])
@pytest.mark.parametrize("phase", [1, 3])
def test_resume_is_bit_exact(kind, phase):
    data, buffer = batches(8), io.BytesIO()
    model = autoencoder()
    opt = LayerwiseStep(WRAPPED[kind](model), model, decay=0.5, layers_per_step=2)
    train(opt, model, data[:phase])
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    expected = train(opt, model, data[phase:])
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(77)
    twin = autoencoder()
    twin.load_state_dict(saved["model"])
    resumed = LayerwiseStep(WRAPPED[kind](twin, 5.0), twin)  # settings come with the state
    resumed.load_state_dict(saved["opt"])
    assert resumed.param_groups is resumed.optimizer.param_groups
    assert train(resumed, twin, data[phase:]) == expected
    assert torch.equal(weights(model), weights(twin))
    assert resumed.step_sizes() == opt.step_sizes()
    assert resumed.summary() == opt.summary()


@pytest.mark.parametrize("kind", ["momentum", "adam", "kfac"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [True, False])
def test_gradient_that_is_not_finite_leaves_no_trace(kind, bad, first):
    model, data = autoencoder(), batches(4)
    opt = LayerwiseStep(WRAPPED[kind](model), model)
    train(opt, model, [] if first else data[:2])
    before = weights(model)
    spoilt = data[2].clone()
    spoilt[3, 1] = bad
    train(opt, model, [spoilt])
    assert torch.equal(before, weights(model))
    for state in [*opt.state.values(), *opt.optimizer.state.values()]:
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.isfinite().all()
    counts = torch.stack([opt.state[model[i].weight]["counts"] for i in (0, 2, 4, 6)])
    assert (counts[:, 3] == 1).all()
    assert counts[:, 2].sum() == (4 if first else 1)
    if kind == "kfac" and first:
        return  # KFAC itself has no statistics to begin with
    losses = train(opt, model, data * 3)
    assert losses[-1] < losses[0]


def test_ascent_keeps_the_last_step_size():
    model, data = autoencoder(), batches(3)
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, layers_per_step=4)
    opt.param_groups[0]["maximize"] = True
    before = weights(model)
    train(opt, model, data[:1])
    assert torch.equal(before, weights(model))  # no good step size yet
    opt.param_groups[0]["maximize"] = False
    train(opt, model, data[1:2])
    alpha = {name: a.clone() for name, a in opt.step_sizes().items()}
    assert all(a > 0 for a in alpha.values())
    opt.param_groups[0]["maximize"] = True
    train(opt, model, data[2:])
    assert opt.step_sizes() == alpha
    assert opt.state[model[0].weight]["counts"].tolist()[:3] == [1, 2, 0]


class Branches(nn.Module):
    """A layer that sits out, one that is frozen and a bare parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.used, self.idle, self.still = (nn.Linear(6, 6) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(6))
        self.still.requires_grad_(False)
        self.path = "used"

    def forward(self, x):
        return self.still(getattr(self, self.path)(x).tanh()) * self.scale


@pytest.mark.parametrize("kind", ["momentum", "kfac"])
def test_parameters_without_gradient_sit_out(kind):
    model, data = Branches(), batches(6)
    opt = LayerwiseStep(WRAPPED[kind](model), model)
    idle = vec(model.idle.parameters()).clone()
    train(opt, model, data[:3])
    assert torch.equal(idle, vec(model.idle.parameters()))
    assert set(opt.step_sizes()) == {"", "used"}
    used = vec(model.used.parameters()).clone()
    model.path = "idle"
    train(opt, model, data[3:4])
    assert torch.equal(used, vec(model.used.parameters()))
    assert not torch.equal(idle, vec(model.idle.parameters()))  # measured when it first appears
    assert set(opt.step_sizes()) == {"", "used", "idle"}
    text = opt.summary()
    assert "(Branches itself)" in text
    assert ("still" in text) == (kind == "momentum")  # which was given it, though frozen


def test_summary():
    model, data = autoencoder(), batches(3)
    opt = LayerwiseStep(WRAPPED["adam"](model), model)
    assert opt.summary().count("not measured") == 4
    train(opt, model, data)
    lines = opt.summary().splitlines()
    assert lines[0] == "LayerwiseStep of Adam"
    assert lines[1].split() == ["layer", "parameters", "step", "size", "memory", "counters"]
    name, size, alpha, own, unit, *counters = lines[2].split()
    assert (name, size, alpha) == ("0", "35", f"{opt.step_sizes()['0'].item():.3g}")
    held = sum(v.numel() * v.element_size() for v in opt.state[model[0].weight].values())
    assert (own, unit) == (str(held), "B")
    assert counters[:2] == ["measured", "2,"]
    assert lines[-1].startswith(f"total memory of the state: {4 * held} B, of Adam's ")


@wrapped
def test_second_run_leaves_no_trace(kind):
    """Dropout masks repeat; buffers, .grad and random numbers are those of one pass."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Linear(5, 6),
        )

    x, (model, twin), seen = batches(1)[0], (network(), network()), []
    opts = LayerwiseStep(WRAPPED[kind](model, 1.0), model), WRAPPED[kind](twin, 1.0)
    model[3].register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    after = []
    for net, opt in zip((model, twin), opts, strict=True):
        torch.manual_seed(5)
        opt.step(closure_of(opt, net, x))
        after.append(torch.get_rng_state())
    assert torch.equal(*after)
    assert torch.equal(seen[0], seen[-1])
    assert len(seen) == (3 if kind == "kbfgs" else 2)
    assert len(list(model.buffers())) == 3
    for own, other in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(own, other)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)
    drawn = [opt.state_dict().get("labels", torch.zeros(1)) for opt in (opts[0].optimizer, opts[1])]
    assert torch.equal(*drawn)  # no labels were sampled in the second run
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        own, other = opts[0].optimizer.state.get(p, {}), opts[1].state.get(q, {})
        assert list(own) == list(other)
        for key, value in own.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key]))


def test_zero_grad_is_the_wrapped_optimizers():
    class Watched(torch.optim.SGD):
        def zero_grad(self, set_to_none=True):
            asked.append(set_to_none)

    asked, model = [], autoencoder()
    opt = LayerwiseStep(Watched(model.parameters(), 0.1), model)
    opt.zero_grad()
    opt.zero_grad(set_to_none=False)
    assert asked == [True, False]


def test_micro_batches_and_two_backwards_equal_the_whole():
    ends = []
    for form in ("whole", "pieces", "twice"):
        model, x = autoencoder(), batches(1, m=24)[0]
        opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_move=FREE)

        def closure(form=form, model=model, opt=opt, x=x):
            opt.zero_grad()
            if form == "twice":
                loss = loss_of(model, x)
                (0.25 * loss).backward(retain_graph=True)
                loss.backward(torch.tensor(0.75))
                return loss
            for part in x.split([24] if form == "whole" else [4, 10, 3, 7]):
                (loss_of(model, part) * len(part) / len(x)).backward()
            return loss_of(model, x).detach()

        opt.step(closure)
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-10, atol=1e-10)  # sums in another order
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-10, atol=1e-10)


def test_backward_for_some_inputs_only():
    """A loss that is backed into one layer alone is measured as that layer's."""
    model, x = autoencoder(), batches(1)[0]
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_step=FREE, max_move=FREE)
    g, H, places = dense(model, x)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, x)
        loss.backward(inputs=list(model[2].parameters()), retain_graph=True)
        (2 * loss).backward(inputs=model[4].weight)
        return loss

    opt.step(closure)
    own = places["2"]
    expected = (g[own] @ g[own]) / (g[own] @ H[own][:, own] @ g[own]).abs()
    torch.testing.assert_close(opt.step_sizes()["2"], expected)
    own = places["4"][: model[4].weight.numel()]
    expected = (g[own] @ g[own]) / (2 * g[own] @ H[own][:, own] @ g[own]).abs()
    torch.testing.assert_close(opt.step_sizes()["4"], expected)
    assert set(opt.step_sizes()) == {"2", "4"}


def test_moves_made_together_are_bounded():
    model, x = autoencoder(), batches(1)[0]
    with torch.no_grad():
        model[0].bias.zero_()
        model[0].weight.mul_(1e-3)
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_step=0.2, max_move=0.05)
    before = {i: vec(model[i].parameters()).clone() for i in (0, 2, 4, 6)}
    train(opt, model, [x])
    cuts = []
    for i, old in before.items():
        alpha, d = opt.step_sizes()[str(i)], vec(p.grad for p in model[i].parameters())
        bound = 0.05 * old.norm() / d.norm()
        cuts.append(int(opt.state[model[i].weight]["counts"][4]))
        assert cuts[-1] == (alpha > bound)
        moved = old - vec(model[i].parameters())
        torch.testing.assert_close(moved, torch.minimum(alpha, bound) * d)
    assert 0 < sum(cuts) < 4


def test_a_layer_of_zeros_is_free_to_move():
    model, x = autoencoder(), batches(1)[0]
    for p in model[6].parameters():
        nn.init.zeros_(p)
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_move=1e-6)
    train(opt, model, [x])
    moved, d = (
        vec(part) for part in zip(*[(p, p.grad) for p in model[6].parameters()], strict=True)
    )
    torch.testing.assert_close(moved, -opt.step_sizes()["6"] * d)
    # the layers before it had no slope: neither measured nor moved, and measured in their turn
    assert opt.state[model[0].weight]["counts"].tolist() == [0, 1, 0, 0, 0]
    train(opt, model, [x])
    assert opt.step_sizes()["0"] > 0


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.down, self.up = nn.Linear(6, 6), nn.Linear(6, 6)
            self.up.weight = self.down.weight

        def forward(self, x):
            return self.up(self.down(x).tanh())

    model, x = Tied(), batches(1)[0]
    g, H, places = dense(model, x)
    opt = LayerwiseStep(WRAPPED["sgd"](model), model, max_step=FREE)
    train(opt, model, [x])
    assert list(places) == list(opt.step_sizes()) == ["down", "up"]
    for name, own in places.items():
        expected = (g[own] @ g[own]) / (g[own] @ H[own][:, own] @ g[own]).abs()
        torch.testing.assert_close(opt.step_sizes()[name], expected)


def test_group_added_later():
    model, data = autoencoder(), batches(4)
    opt = LayerwiseStep(torch.optim.SGD(model[:3].parameters(), 0.1), model)
    scheduler = torch.optim.lr_scheduler.StepLR(opt.optimizer, 1)  # harmless, and without warnings
    train(opt, model, data[:2])
    scheduler.step()
    assert set(opt.step_sizes()) == {"0", "2"}
    opt.add_param_group({"params": model[4:].parameters(), "momentum": 0.5})
    train(opt, model, data[2:])
    assert set(opt.step_sizes()) == {"0", "2", "4", "6"}
    assert len(opt.param_groups) == len(opt.optimizer.param_groups) == 2


def test_low_precision_model():
    model, data = autoencoder().to(torch.bfloat16), [x.to(torch.bfloat16) for x in batches(8)]
    opt = LayerwiseStep(WRAPPED["sgd"](model), model)
    losses = train(opt, model, data)
    assert losses[-1] < losses[0]
    opt.load_state_dict(opt.state_dict())
    assert {a.dtype for a in opt.step_sizes().values()} == {torch.float32}
    assert opt.state[model[0].weight]["counts"].dtype == torch.int64


def test_attention_and_convolutions():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    image = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    )
    inputs = torch.randn(4, 5, 8), torch.randn(4, 1, 6, 6)
    for model, x in zip((encoder, image), inputs, strict=True):
        opt = LayerwiseStep(WRAPPED["momentum"](model), model)

        def loss(model, x):
            return model(x).sub(1).square().mean()

        losses = [opt.step(closure_for(opt, model, x, loss)).item() for _ in range(10)]
        assert losses[-1] < losses[0]
        assert all(a > 0 for a in opt.step_sizes().values())


@wrapped
def test_training_goes_down(kind):
    model, data = autoencoder(), batches(24)
    opt = LayerwiseStep(WRAPPED[kind](model), model)
    losses = train(opt, model, data)
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_extra_arithmetic_is_about_one_gradient():
    """Products of matrices counted over one round of turns, over those of a plain step."""
    totals = []
    for wrap in (False, True):
        model, x = autoencoder((40, 40, 40, 40, 40, 40)), torch.rand(16, 40)
        opt = WRAPPED["sgd"](model)
        opt = LayerwiseStep(opt, model) if wrap else opt
        train(opt, model, [x])  # all layers
        with FlopCounterMode(display=False) as counter:
            train(opt, model, [x] * 5)
        totals.append(counter.get_total_flops())
    assert 0.8 < totals[1] / totals[0] - 1 < 1.2


@pytest.mark.parametrize("backward", [torch.autograd.backward, lambda _loss: None])
def test_closure_whose_backward_is_not_seen(backward):
    model, x = autoencoder(), batches(1)[0]
    opt = LayerwiseStep(WRAPPED["sgd"](model), model)
    before = weights(model)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, x)
        backward(loss)
        return loss

    with pytest.raises(ValueError, match=r"no gradient by loss.backward\(\)"):
        opt.step(closure)
    assert torch.equal(before, weights(model))
    assert opt.param_groups[0]["lr"] == 0.1


def test_errors():
    model = autoencoder()
    sgd = WRAPPED["sgd"](model)
    with pytest.raises(TypeError, match="LayerwiseStep evaluates the loss twice"):
        LayerwiseStep(sgd, model).step()
    with pytest.raises(TypeError, match="first argument is the optimizer to wrap, got Sequential"):
        LayerwiseStep(model, sgd)
    with pytest.raises(ValueError, match="8 parameters of the optimizer are not in Linear"):
        LayerwiseStep(sgd, nn.Linear(2, 2))
    for name, value in {"decay": 1.0, "max_step": 0, "max_move": -1, "layers_per_step": 0}.items():
        with pytest.raises(ValueError, match=name):
            LayerwiseStep(sgd, model, **{name: value})
    sparse = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    opt = LayerwiseStep(WRAPPED["sgd"](sparse), sparse)
    x = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="sparse=False"):
        opt.step(closure_for(opt, sparse, x, lambda model, x: model(x).square().sum()))
