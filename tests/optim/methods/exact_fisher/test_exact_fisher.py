"""ExactFisher against dense solves."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from kronscope.optim.capture.likelihoods import sampled_score
from kronscope.optim.methods.exact_fisher.exact_fisher import ExactFisher
from tests.optim.models import CASES, Case, cnn, gaussian_loss, normal, seeded
from tests.optim.oracles import ORACLES

ORACLE = ORACLES["ExactFisher"]
every_case = pytest.mark.parametrize("case", sorted(CASES))
SETTINGS = {"lr": 0.5, "damping": 0.05}


def backward(opt, case, batch):
    opt.zero_grad()
    case.loss(case.model, batch).backward()


def train(opt, case, batches):
    for batch in batches:
        backward(opt, case, batch)
        opt.step()


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def dense(operator):
    return operator @ torch.eye(operator.shape[0])


def twins(case, likelihood, **settings):
    """Optimizer, oracle of the same labels, and the oracle's score."""
    settings = {**SETTINGS, **settings}
    theirs = {k: v for k, v in settings.items() if k != "decoupled_weight_decay"}
    oracle = ORACLE(case.model, case.loss, decoupled=len(theirs) < len(settings), **theirs)
    opt = ExactFisher(case.model, likelihood=likelihood, **settings)
    if likelihood == "empirical":
        return opt, oracle, None
    labels = torch.Generator()
    labels.set_state(opt._harness.labels.get_state())
    return opt, oracle, lambda z: sampled_score(likelihood, z, labels)


def assert_like_the_oracle(opt, oracle, model):
    # two orders of the same sums, several steps; the Woodbury form cancels up to ‖F‖ / damping,
    # here below 1e4
    torch.testing.assert_close(weights(model), weights(oracle.model), rtol=1e-10, atol=1e-12)
    maps, curvature = opt.preconditioner(), opt.curvature()
    assert maps.keys() == oracle.P.keys()
    for name, P in oracle.P.items():
        torch.testing.assert_close(dense(maps[name]), P, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dense(curvature[name]), oracle.curvature[name])
        v = torch.arange(1.0, len(P) + 1)
        torch.testing.assert_close(maps[name] @ v, P @ v, rtol=1e-10, atol=1e-10)


@every_case
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"likelihood": "empirical", "momentum": 0.0},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"update_every": 3},
    ],
    ids=["sampled", "empirical", "decay", "decoupled", "every 3"],
)
def test_steps_of_the_oracle(case, settings):
    case = CASES[case]()
    opt, oracle, score = twins(case, **{"likelihood": case.likelihood, **settings})
    for batch in case.batches[:7]:
        train(opt, case, [batch])
        oracle.step(batch, score)
    assert_like_the_oracle(opt, oracle, case.model)


@pytest.mark.parametrize("likelihood", ["categorical", "empirical"])
def test_warm_up_takes_the_last_batch(likelihood):
    case = cnn()
    before, ran = weights(case.model), []

    def closure(batch):
        ran.append(batch)
        case.loss(case.model, batch).backward()

    opt, oracle, score = twins(case, likelihood)
    opt.warm_up(partial(closure, batch) for batch in case.batches[:3])
    assert len(ran) == 1
    assert torch.equal(weights(case.model), before)
    assert all(p.grad is None for p in case.model.parameters())
    oracle.step(case.batches[2], score)
    for name, F in oracle.curvature.items():
        torch.testing.assert_close(dense(opt.curvature()[name]), F)


@every_case
def test_batches_of_any_size(case):
    case = CASES[case](m=9)
    opt, oracle, score = twins(case, case.likelihood)
    for batch, m in zip(case.batches, (4, 9, 1, 6, 2), strict=False):
        part = tuple(tensor[:m] for tensor in batch)
        train(opt, case, [part])
        oracle.step(part, score)
    assert_like_the_oracle(opt, oracle, case.model)


class Sequence(nn.Module):
    """One layer on sequences, whose length may change."""

    def __init__(self):
        super().__init__()
        self.mix, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(torch.tanh(self.mix(x)).mean(1))


def test_sequences_of_any_length():
    batches = [(normal(6, T, 5), normal(6, 2, seed=T)) for T in (2, 3, 1, 7, 4)]
    model = seeded(Sequence)
    case = Case(model, batches, gaussian_loss, "gaussian")
    opt, oracle, score = twins(case, "gaussian")
    for batch in batches:
        train(opt, case, [batch])
        oracle.step(batch, score)
        assert_like_the_oracle(opt, oracle, model)
    assert opt.state[model.mix.weight]["x"].shape == (6, 4, 6)  # never more rows than outputs


@every_case
def test_micro_batches_are_the_big_batch(case):
    whole = CASES[case]()
    pieces = whole._replace(model=copy.deepcopy(whole.model))
    one = ExactFisher(whole.model, **SETTINGS, likelihood="empirical")
    many = ExactFisher(pieces.model, **SETTINGS, likelihood="empirical")
    for batch in whole.batches[:3]:
        train(one, whole, [batch])
        many.zero_grad()
        for part in (slice(0, 3), slice(3, 8)):
            x, t = (tensor[part] for tensor in batch)
            (pieces.loss(pieces.model, (x, t)) * len(x) / 8).backward()
        many.step()
    # sums in another order, three steps
    torch.testing.assert_close(weights(whole.model), weights(pieces.model), rtol=1e-10, atol=1e-12)


def test_between_updates_the_damping_of_the_last_one_holds():
    case = cnn()
    opt = ExactFisher(case.model, **SETTINGS, likelihood="categorical", update_every=2)
    train(opt, case, case.batches[:1])
    before = dense(opt.preconditioner()["2"])
    opt.param_groups[0]["damping"] = 1.0
    train(opt, case, case.batches[1:2])
    assert torch.equal(dense(opt.preconditioner()["2"]), before)
    train(opt, case, case.batches[2:3])
    F, P = dense(opt.curvature()["2"]), dense(opt.preconditioner()["2"])
    torch.testing.assert_close(P @ (F + torch.eye(len(F))), torch.eye(len(F)))


@every_case
def test_frozen_step_is_minus_lr_P_gradient(case):
    case = CASES[case]()
    opt = ExactFisher(case.model, lr=0.01, damping=0.05, momentum=0.0, likelihood=case.likelihood)
    train(opt, case, case.batches[:2])
    labels = opt._harness.labels.get_state()
    with opt.frozen():
        backward(opt, case, case.batches[2])
        expected = {}
        for stack, block in opt._harness.started():
            G = opt._harness.gradient(stack, [block])[stack.places[block]]
            step = opt.preconditioner()[block.name] @ G.reshape(-1)
            for p, part in block.parts(step.reshape(G.shape)):
                expected[p] = p.detach() - 0.01 * part.reshape(p.shape)
        opt.step()
    assert torch.equal(opt._harness.labels.get_state(), labels)
    for p in case.model.parameters():
        torch.testing.assert_close(p.detach(), expected[p])
