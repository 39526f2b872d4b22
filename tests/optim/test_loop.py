"""What every optimizer owes the training loop, over all of them."""

import copy
import io
import pickle
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from optim import KBFGS, KFAC

CASES = runpy.run_path(str(Path(__file__).with_name("cases.py")))  # suites cannot import
MAKE = CASES["MAKE"]
autoencoder = CASES["autoencoder"]
batches = CASES["batches"]
blocks = CASES["blocks"]
closure_of = CASES["closure_of"]
gradient = CASES["gradient"]
loss_of = CASES["loss_of"]
statistics = CASES["statistics"]
train = CASES["train"]
w_bar = CASES["w_bar"]
weights = CASES["weights"]

every = pytest.mark.parametrize("kind", sorted(MAKE))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(p[k], q[k]) for p, q in zip(a, b, strict=True) for k in p
    )


def moved(model, opt, x, read):
    """Old weights, and P read before or after the step, per layer."""
    before = {n: w_bar(layer) for n, layer in blocks(model).items()}

    def dense():
        return {n: P @ torch.eye(P.shape[0]) for n, P in opt.preconditioner().items()}

    P = dense() if read == "before" else None
    train(opt, model, [x])
    P = P or dense()
    for name, layer in blocks(model).items():
        expected = -opt.param_groups[0]["lr"] * P[name] @ gradient(layer).reshape(-1)
        # rounding of a step added to weights of size one
        torch.testing.assert_close(
            (w_bar(layer) - before[name]).reshape(-1), expected, rtol=1e-9, atol=1e-13
        )


@every
def test_honesty(kind):
    model, data = autoencoder(), batches(6)
    opt = MAKE[kind](model, momentum=0.0)
    train(opt, model, data[:4])
    moved(model, opt, data[4], "before" if kind.startswith("kbfgs") else "after")
    before = statistics(opt)
    with opt.frozen():
        moved(model, opt, data[5], "before")
        moved(model, opt, data[5], "after")
    assert same(before, statistics(opt))


@every
@pytest.mark.parametrize("phase", [0, 1, 5])
@pytest.mark.parametrize("warm", [False, True])
def test_resume_is_bit_exact(kind, phase, warm):
    data = batches(9)
    model = autoencoder()
    opt = MAKE[kind](model, weight_decay=1e-3)
    if warm:
        opt.warm_up([closure_of(opt, model, x) for x in data[:2]])
    train(opt, model, data[:phase])
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, buffer)
    expected = train(opt, model, data[phase:])
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    torch.manual_seed(77)
    twin = autoencoder()
    twin.load_state_dict(saved["model"])
    resumed = MAKE[kind](twin, lr=9.0) if kind.startswith("kbfgs") else MAKE[kind](twin)
    resumed.load_state_dict(saved["opt"])
    assert train(resumed, twin, data[phase:]) == expected
    assert torch.equal(weights(model), weights(twin))
    assert same(statistics(opt), statistics(resumed))


@every
def test_low_precision_model_keeps_float32_factors(kind):
    model, data = autoencoder().to(torch.bfloat16), [x.to(torch.bfloat16) for x in batches(4)]
    opt = MAKE[kind](model)
    train(opt, model, data[:2])
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    for state, other in zip(opt.state.values(), saved["state"].values(), strict=True):
        for key, value in state.items():
            counter = key == "counts" or key.endswith("failures")
            assert value.dtype == (torch.int64 if counter else torch.float32)
            assert torch.equal(value, other[key])
    train(opt, model, data[2:])
    assert model[0].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", sorted(set(MAKE) - {"kfac"}))  # it draws other labels
def test_batches_in_pieces_equal_the_whole(kind):
    pair = []
    for pieces in (1, 4):
        model, data = autoencoder(), batches(3, m=24)
        opt = MAKE[kind](model)
        for x in data:

            def closure(x=x, pieces=pieces, model=model, opt=opt):
                opt.zero_grad()
                for part in x.split([24] if pieces == 1 else [4, 10, 3, 7]):
                    (loss_of(model, part) * len(part) / len(x)).backward()
                return loss_of(model, x).detach()

            opt.step(closure)
        pair.append(weights(model))
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-10)  # sums in another order


@every
def test_gradients_after_the_step_are_those_of_the_first_pass(kind):
    model, x = autoencoder(), batches(1)[0]
    twin = copy.deepcopy(model)
    loss_of(twin, x).backward()
    opt = MAKE[kind](model)

    def closure():
        opt.zero_grad(set_to_none=False)
        loss = loss_of(model, x)
        loss.backward()
        return loss

    opt.step(closure)
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad)


@every
def test_dropout_and_random_state(kind):
    model, x = autoencoder(activation=lambda: nn.Dropout(0.5)), batches(1)[0]
    opt, seen = MAKE[kind](model), []
    model[1].register_forward_hook(lambda _m, _i, out: seen.append(out == 0))
    torch.manual_seed(5)
    train(opt, model, [x])
    after = torch.get_rng_state()
    if kind.startswith("kbfgs"):
        assert len(seen) == 2
        assert torch.equal(seen[0], seen[1])
    torch.manual_seed(5)
    model(x)
    assert torch.equal(after, torch.get_rng_state())


@every
def test_batch_norm_sees_one_pass(kind):
    def network():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6))

    model, twin, x = network(), network(), batches(1)[0]
    opt = MAKE[kind](model)
    opt.warm_up([closure_of(opt, model, x)])
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    norm = model[1].weight.detach().clone()
    train(opt, model, [x])
    twin(x)
    assert len(list(model.buffers())) == 3
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
    expected = norm - opt.param_groups[0]["lr"] * 0.1 * model[1].weight.grad  # the plain rule
    torch.testing.assert_close(model[1].weight.detach(), expected)


@every
def test_in_place_activation_changes_nothing(kind):
    results = []
    for inplace in (False, True):
        model, data = autoencoder(activation=lambda i=inplace: nn.ReLU(inplace=i)), batches(3)
        train(MAKE[kind](model), model, data)
        results.append(weights(model))
    assert torch.equal(*results)


@every
def test_evaluation_leaves_no_trace(kind):
    results = []
    for evaluate in (False, True):
        model, data = autoencoder(), batches(4)
        opt = MAKE[kind](model, decay=0.5)
        for x in data:
            closure = closure_of(opt, model, x)
            if evaluate:
                with torch.no_grad():
                    model(data[0])
            opt.step(closure)
        results.append(weights(model))
    assert torch.equal(*results)


def test_forward_without_backward_is_not_counted():
    results = []
    for extra in (False, True):
        model, data = autoencoder(), batches(3)
        opt = MAKE["kfac-empirical"](model)
        for x in data:
            model.zero_grad() if extra else opt.zero_grad()
            if extra:
                model(data[0])
            loss_of(model, x).backward()
            opt.step()
        results.append(weights(model))
    assert torch.equal(*results)


@every
def test_non_finite_gradients_never_enter(kind):
    model, data = autoencoder(), batches(5)
    opt = MAKE[kind](model)
    train(opt, model, data[:2])
    before = weights(model)
    train(opt, model, [data[2] * float("nan")])
    assert torch.equal(before, weights(model))
    for state in opt.state.values():
        assert all(torch.isfinite(v).all() for v in state.values())
        assert state["counts"][-1] > 0
    assert all(torch.isfinite(torch.tensor(train(opt, model, data[3:]))))
    assert "not finite" in opt.summary()


@every
def test_one_bad_layer_stops_alone(kind):
    model, data = autoencoder(), batches(3)
    opt = MAKE[kind](model)
    train(opt, model, data[:1])
    before = {n: w_bar(layer) for n, layer in blocks(model).items()}

    def closure():
        opt.zero_grad()
        loss = loss_of(model, data[1])
        loss.backward()
        if model[0].weight.grad is not None:  # K-BFGS's second pass makes none
            model[0].weight.grad[0, 0] = float("inf")
        return loss

    opt.step(closure)
    after = {n: w_bar(layer) for n, layer in blocks(model).items()}
    assert torch.equal(before["0"], after["0"])
    assert not torch.equal(before["2"], after["2"])
    assert torch.isfinite(opt.state[model[0].weight]["momentum"]).all()


@every
def test_frozen_shared_and_plain_parameters(kind):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle = nn.Linear(6, 4), nn.Linear(4, 4, bias=False)
            self.scale = nn.Parameter(torch.ones(4))
            self.still, self.fixed = nn.Linear(4, 4), nn.Linear(4, 4)
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.last = nn.Linear(4, 6)
            self.still.weight.requires_grad_(False)
            self.fixed.bias.requires_grad_(False)

        def forward(self, x):
            x = self.fixed(self.still(self.middle(self.first(x)).tanh() * self.scale))
            return self.last(self.two(self.one(x).tanh()))

    model, data = Tied(), batches(3)
    opt = MAKE[kind](model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(opt, model, data)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(before) - {"still.weight", "fixed.bias"}
    shapes = {n: P.shape[0] for n, P in opt.preconditioner().items()}
    assert shapes == {"first": 28, "middle": 16, "fixed": 16, "last": 30}
    text = opt.summary()
    for said in (
        "shared as one.weight, two.weight",
        "plain rule: no block for Tied",
        "the weight beside it is frozen",
        "still.weight",
        "frozen",
        "block 'first' [4, 7]",
        "total memory of the state",
    ):
        assert said in text


def test_unused_layer_is_skipped():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.used(x)

    for kind in MAKE:
        model = Half()
        before = model.spare.weight.detach().clone()
        opt = MAKE[kind](model)
        train(opt, model, batches(2))
        assert torch.equal(model.spare.weight, before)
        assert list(opt.preconditioner()) == ["used"]


@every
def test_scheduler_and_damping_are_honoured(kind):
    model, data = autoencoder(), batches(3)
    opt = MAKE[kind](model)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda epoch: 0.0 if epoch else 1.0)
    train(opt, model, data[:1])
    schedule.step()
    opt.param_groups[0]["damping"] = 1.5
    before = weights(model)
    train(opt, model, data[1:])
    assert torch.equal(before, weights(model))


@every
def test_copies_of_the_model_are_free_of_the_optimizer(kind):
    model, x = autoencoder(), batches(1)[0]
    opt = MAKE[kind](model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    opt.zero_grad()
    loss_of(model, x).backward()
    if kind.startswith("kfac"):
        before = opt._harness.capture.totals["0"].examples
        loss_of(twin, x).backward()
        loss_of(thawed, x).backward()
        assert opt._harness.capture.totals["0"].examples == before == 16
    del opt
    loss_of(model, x).backward()


@every
def test_training_beats_sgd(kind):
    data = batches(8, m=32) * 15
    start = loss_of(autoencoder(), data[0]).item()
    best = min(
        _last(lambda m, lr=lr: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9), data)
        for lr in (0.003, 0.01, 0.03)
    )
    own = _last(
        lambda m: MAKE[kind](m, damping=0.1) if "kb" in kind else KFAC(m, damping=0.1), data
    )
    assert own < best < start


def _last(make, data):
    model = autoencoder()
    losses = train(make(model), model, data)
    return sum(losses[-8:]) / 8


def test_kbfgs_l_with_room_equals_dense():
    results = []
    for history in (None, 30):
        model, data = autoencoder(), batches(20)
        train(KBFGS(model, history=history), model, data)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)  # compact form's rounding


def test_kfac_loop_without_closure():
    results = []
    for closure in (False, True):
        model, data = autoencoder(), batches(4)
        opt = MAKE["kfac"](model)
        for x in data:
            if closure:
                opt.step(closure_of(opt, model, x))
            else:
                opt.zero_grad()
                loss_of(model, x).backward()
                assert opt.step() is None
        results.append(weights(model))
    assert torch.equal(*results)
