"""What every optimizer owes the training loop, over all of them."""

import copy
import gc
import inspect
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kronscope import optim
from kronscope.optim import KBFGS
from tests.optim.cases import (
    CLOSURE,
    MAKE,
    ONE_EACH,
    RECIPES,
    autoencoder,
    batches,
    closure_of,
    each,
    is_sampled,
    loss_of,
    make_for,
    same,
    state_of,
    statistics,
    takes,
    train,
    train_on,
    weights,
)
from tests.optim.models import CASES, NAMES

every = pytest.mark.parametrize("kind", each(MAKE))
one_each = pytest.mark.parametrize("kind", each(ONE_EACH))


@every
def test_the_signature_is_the_common_one(kind):
    method = getattr(optim, RECIPES[kind].method)
    parameters = inspect.signature(method).parameters
    names = list(parameters)
    assert names[:3] == ["model", "lr", "damping"]
    for name in ("momentum", "decay", "weight_decay", "likelihood", "update_every"):
        if name in names:
            assert parameters[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    for name in ("decoupled_weight_decay", "groups", "stagger"):
        if name in names:
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
    own = {"decoupled_weight_decay"} if kind != "kfac-2015" else set()  # its model has L2 alone
    assert {"momentum", "weight_decay", "groups"} | own <= set(names)
    assert parameters["momentum"].default == 0.9
    classes = [kind for kind in method.__mro__ if issubclass(kind, optim.CurvatureOptimizer)]
    said = "".join(kind.__doc__ for kind in classes)
    for told in (*names[1:], "Source:", "Raises:", "State of each"):
        assert told in said, told
    owed = ("zero_grad", "warm_up", "frozen", "preconditioner", "summary", "add_param_group")
    for name in (*owed, "step", "state_dict", "load_state_dict"):
        assert getattr(method, name).__doc__, name


@every
@pytest.mark.parametrize("name", NAMES)
def test_training_lowers_the_loss(kind, name):
    case = CASES[name]()
    opt = make_for(kind, case)
    losses = train_on(opt, case, case.batches[:2] * 12)
    assert sum(losses[-2:]) < 0.99 * sum(losses[:2])


@one_each
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


@one_each
def test_evaluation_leaves_no_trace(kind):
    results = []
    for evaluate in (False, True):
        model, data = autoencoder(), batches(4)
        opt = MAKE[kind](model)
        for x in data:
            if evaluate:
                with torch.no_grad():
                    model(data[0])
            opt.step(closure_of(opt, model, x))
        results.append((weights(model), state_of(opt)))
    assert torch.equal(results[0][0], results[1][0])
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", each(set(MAKE) - CLOSURE))
@pytest.mark.parametrize("closure", [False, True])
def test_gradients_cleared_by_the_model_and_forwards_without_backward(kind, closure):
    """model.zero_grad() clears as opt.zero_grad() does; a forward alone counts for nothing."""
    if is_sampled(kind):
        pytest.skip("each training forward draws labels")
    results = []
    for extra in (False, True):
        model, data = autoencoder(), batches(3)
        opt = MAKE[kind](model)
        for x in data:
            if extra:
                loss_of(model, data[0]).backward()
                model.zero_grad()
                model(data[1])
            if closure:
                opt.step(closure_of(opt, model, x))
            else:
                model.zero_grad()
                loss_of(model, x).backward()
                assert opt.step() is None
        results.append(weights(model))
    assert torch.equal(*results)


@one_each
def test_gradients_zeroed_in_place(kind):
    """Zeros in .grad say nothing to the optimizer: what a step has used must not count again."""
    results = []
    for in_place in (False, True):
        case = CASES["shared"]()
        opt = make_for(kind, case)
        for batch in case.batches[:4]:

            def closure(batch=batch, case=case, opt=opt, in_place=in_place):
                case.model.zero_grad(set_to_none=False) if in_place else opt.zero_grad()
                loss = case.loss(case.model, batch)
                loss.backward()
                return loss

            opt.step(closure)
        results.append(weights(case.model))
    assert torch.equal(*results)


@one_each
def test_recomputed_activations_change_nothing(kind):
    """torch.utils.checkpoint runs part of the forward again within backward."""

    class Checkpointed(nn.Module):
        def __init__(self, again):
            super().__init__()
            torch.manual_seed(1)
            self.first, self.last, self.again = nn.Linear(6, 5), nn.Linear(5, 6), again
            self.inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 5))

        def forward(self, x):
            x = self.first(x).tanh()
            x = checkpoint(self.inner, x, use_reentrant=False) if self.again else self.inner(x)
            return self.last(x.tanh())

    results = []
    for again in (False, True):
        model = Checkpointed(again)
        train(MAKE[kind](model), model, batches(4))
        results.append(weights(model))
    assert torch.equal(*results)


@one_each
def test_copies_of_the_model_are_free_of_the_optimizer(kind):
    model, x = autoencoder(), batches(1)[0]
    opt = MAKE[kind](model)
    twin, thawed = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    opt.zero_grad()
    loss_of(model, x).backward()
    totals = opt._harness.capture.totals
    before = {name: total.examples for name, total in totals.items()}
    loss_of(twin, x).backward()
    loss_of(thawed, x).backward()
    assert {name: total.examples for name, total in totals.items()} == before
    assert set(before.values()) <= {16}
    del opt
    loss_of(model, x).backward()


@pytest.fixture
def few_objects():
    """A collector that does not look at what is there before the test."""
    gc.collect(0)
    gc.freeze()
    yield
    gc.unfreeze()


@one_each
@pytest.mark.usefixtures("few_objects")
def test_nothing_outlives_the_optimizer(kind):
    model, x = autoencoder(), batches(1)[0]
    opt = MAKE[kind](model)
    train(opt, model, [x])
    gone = weakref.ref(opt._harness.capture)
    del opt
    gc.collect()
    assert gone() is None


@one_each
@pytest.mark.usefixtures("few_objects")
def test_batches_do_not_outlive_the_step(kind):
    """Of a kept loss's graph only autograd's own part stays."""
    model, x = autoencoder(), batches(1)[0].clone()
    opt = MAKE[kind](model)
    losses = [opt.step(closure_of(opt, model, x)) for _ in range(2)]
    opt.zero_grad()
    assert all(not total.kept for total in opt._harness.capture.totals.values())
    del losses
    gone = weakref.ref(x)
    del x
    gc.collect()
    assert gone() is None


@one_each
def test_steps_are_counted_and_labels_are_the_optimizers_own(kind):
    model, data = autoencoder(), batches(4)
    opt = MAKE[kind](model)
    before = torch.get_rng_state()
    train(opt, model, data)
    assert torch.equal(torch.get_rng_state(), before)
    assert {group["step"] for group in opt.param_groups} == {4}
    with opt.frozen():
        train(opt, model, data[:1])
    assert opt.param_groups[0]["step"] == 5


@every
def test_update_every(kind):
    if not takes(kind, "update_every"):
        pytest.skip("it updates at every step")
    case = CASES["mlp"]()
    opt = make_for(kind, case, update_every=3, refresh_every=1)
    known, moved = None, []
    for batch in case.batches[:7]:
        train_on(opt, case, [batch])
        now = statistics(opt)
        for state in now if "U_A" in now[0] else []:
            del state["S"]  # EKFAC carries it into each new basis
        moved.append(known is None or not same(known, now))
        known = now
    assert [k for k, m in enumerate(moved) if m] == [0, 3, 6]


def test_kbfgs_l_with_room_equals_dense():
    results = []
    for history in (None, 30):
        model, data = autoencoder(), batches(20)
        train(KBFGS(model, history=history), model, data)
        results.append(weights(model))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)  # compact form's rounding


@every
def test_batches_of_other_sizes(kind):
    """The last batch of an epoch is smaller."""
    model = autoencoder()
    opt = MAKE[kind](model)
    sizes = [16, 16, 5, 16, 1, 16]
    losses = train(opt, model, [x[:m] for x, m in zip(batches(6), sizes, strict=True)])
    assert torch.isfinite(torch.tensor(losses)).all()
    assert torch.isfinite(weights(model)).all()
