"""Eva against a slow dense oracle and dense solves; its clip, its failures, its state."""

import copy

import pytest
import torch
from torch import nn

from kronscope.optim.core import momentum
from kronscope.optim.linalg import basics as linalg
from kronscope.optim.methods.eva import eva
from kronscope.optim.methods.eva.eva import Eva
from kronscope.optim.methods.eva.formulas import rank_one_solve_
from tests.optim.models import CASES, Case, cnn, gaussian_loss, normal, seeded
from tests.optim.oracles import ORACLES

ORACLE = ORACLES["Eva"]
every_case = pytest.mark.parametrize("case", sorted(CASES))


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


def gradient(opt, stack, block):
    """vec of the gradient of W_bar."""
    return opt._harness.gradient(stack, [block])[stack.places[block]].reshape(-1)


@every_case
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kl_clip": float("inf"), "decay": 0.8, "momentum": 0.5},
        {"weight_decay": 0.1, "damping": 0.03},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"update_every": 3, "kl_clip": 1e-5},
    ],
    ids=["default", "no clip", "decay", "decoupled", "every 3"],
)
def test_steps_of_the_oracle(case, settings):
    # with damping near ‖x̄‖² ‖ḡ‖² the rank-one term is no small correction
    settings = {"lr": 1e-3, "damping": 1e-3, **settings}
    case = CASES[case]()
    theirs = {k: v for k, v in settings.items() if k != "decoupled_weight_decay"}
    oracle = ORACLE(case.model, case.loss, decoupled=len(theirs) < len(settings), **theirs)
    opt = Eva(case.model, **settings)
    for batch in case.batches[:7]:
        train(opt, case, [batch])
        oracle.step(batch)
        assert opt.nu.item() == pytest.approx(oracle.nu, rel=1e-10)
    # two orders of the same sums, seven steps
    torch.testing.assert_close(weights(case.model), weights(oracle.model), rtol=1e-10, atol=1e-12)
    maps, curvature = opt.preconditioner(), opt.curvature()
    assert maps.keys() == oracle.P.keys()
    for name, P in oracle.P.items():
        # the dense inverse loses what the rank-one term adds to the damping, a factor of 10
        torch.testing.assert_close(dense(maps[name]), P, rtol=1e-9, atol=1e-9)
        v = torch.arange(1.0, len(P) + 1)
        torch.testing.assert_close(maps[name] @ v, P @ v, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dense(curvature[name]), oracle.curvature[name])


def test_rank_one_solve_is_the_dense_solve():
    generator = torch.Generator().manual_seed(0)
    G, g, x = (torch.randn(2, *shape, generator=generator) for shape in ((3, 4), (3,), (4,)))
    Delta, inner = rank_one_solve_(G.clone(), g, x, 0.2)
    for j in range(2):
        u = torch.kron(g[j], x[j])
        expected = torch.linalg.solve(0.2 * torch.eye(12) + torch.outer(u, u), G[j].reshape(-1))
        torch.testing.assert_close(Delta[j].reshape(-1), expected)
        torch.testing.assert_close(inner[j], expected @ G[j].reshape(-1))


@every_case
@pytest.mark.parametrize("kl_clip", [None, 1e-6])
def test_frozen_step_is_minus_lr_nu_P_gradient(case, kl_clip):
    case = CASES[case]()
    opt = Eva(case.model, lr=0.01, momentum=0.0, kl_clip=kl_clip)
    train(opt, case, case.batches[:2])
    held = {name: dense(P) for name, P in opt.preconditioner().items()}
    with opt.frozen():
        backward(opt, case, case.batches[2])
        found = opt._harness.started()
        grads = {block.name: gradient(opt, stack, block) for stack, block in found}
        before = {block.name: [p.detach().clone() for p in block.parameters] for _, block in found}
        opt.step()
    assert opt.nu == 1 if kl_clip is None else 0 < opt.nu < 0.5
    for stack, block in found:
        step = (-0.01 * opt.nu * held[block.name] @ grads[block.name]).reshape(-1, stack.shape[1])
        torch.testing.assert_close(dense(opt.preconditioner()[block.name]), held[block.name])
        expected = [part.reshape(p.shape) for p, part in block.parts(step)]
        for p, old, change in zip(block.parameters, before[block.name], expected, strict=True):
            torch.testing.assert_close(p - old, change)  # p - old rounds at 1e-16 of p


class WithScale(nn.Module):
    """A Linear and two parameters outside any block."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.LayerNorm(4)
        self.last = nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


def with_norm():
    batches = [(normal(8, 3, seed=s), normal(8, 2, seed=s + 9)) for s in range(4)]
    model = seeded(WithScale)
    return Case(model, batches, gaussian_loss, "gaussian")


def test_the_clip_is_over_layers_with_their_own_lr_and_leaves_the_plain_rule_alone():
    case = with_norm()
    model = case.model
    own = {"params": model.last.parameters(), "lr": 0.5, "damping": 0.2}
    opt = Eva(model, lr=0.1, damping=0.3, momentum=0.0, kl_clip=1e-3, groups=[own])
    backward(opt, case, case.batches[0])
    before, grad = model.norm.weight.detach().clone(), model.norm.weight.grad.clone()
    opt.step()
    total = 0.0
    for stack, block in opt._harness.started():
        G = gradient(opt, stack, block)
        lr = 0.5 if block.name == "last" else 0.1
        total += lr**2 * G @ (opt.preconditioner()[block.name] @ G)
    torch.testing.assert_close(opt.nu, (1e-3 / total).sqrt())
    assert opt.nu < 1
    torch.testing.assert_close(model.norm.weight.detach(), before - 0.1 * grad)


@every_case
def test_micro_batches_are_the_big_batch(case):
    whole = CASES[case]()
    pieces = whole._replace(model=copy.deepcopy(whole.model))
    one, many = Eva(whole.model), Eva(pieces.model)
    for batch in whole.batches[:3]:
        train(one, whole, [batch])
        many.zero_grad()
        for part in (slice(0, 3), slice(3, 8)):
            x, t = (whole_batch[part] for whole_batch in batch)
            (pieces.loss(pieces.model, (x, t)) * len(x) / 8).backward()
        many.step()
    # sums in another order, three steps
    torch.testing.assert_close(weights(whole.model), weights(pieces.model), rtol=1e-10, atol=1e-12)


def test_warm_up_is_the_mean_over_batches():
    case = cnn()
    before = weights(case.model)
    opt = Eva(case.model)
    opt.warm_up([lambda b=b: case.loss(case.model, b).backward() for b in case.batches[:3]])
    oracle = ORACLE(case.model, case.loss, lr=0.1, damping=0.03)
    oracle.warm_up(case.batches[:3])
    assert torch.equal(weights(case.model), before)
    for name, curvature in oracle.curvature.items():
        torch.testing.assert_close(dense(opt.curvature()[name]), curvature)
    train(opt, case, case.batches[3:6])
    for batch in case.batches[3:6]:
        oracle.step(batch)
    torch.testing.assert_close(weights(case.model), weights(oracle.model), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("where", ["gradient", "input"])
def test_what_is_not_finite_changes_nothing(where):
    case = cnn()
    layer = case.model[0]
    opt = Eva(case.model)
    train(opt, case, case.batches[:2])
    before = {k: v.clone() for k, v in opt.state[layer.weight].items()}
    W = layer.weight.detach().clone()
    x, t = case.batches[2]
    if where == "input":
        x = x.clone()
        x[0, 0, 0, 0] = float("nan")
    backward(opt, case, (x, t))
    if where == "gradient":
        layer.weight.grad[0] = float("inf")
    opt.step()
    after = opt.state[layer.weight]
    assert torch.equal(layer.weight, W)
    assert torch.equal(after["momentum"], before["momentum"])
    assert after["counts"][1] == (1 if where == "gradient" else 2)  # statistics and gradient
    if where == "input":
        assert torch.equal(after["x"], before["x"])
    for state in opt.state.values():
        assert all(torch.isfinite(v).all() for v in state.values())
    assert torch.isfinite(opt.nu)
    train(opt, case, case.batches[3:5])
    assert not torch.equal(layer.weight, W)


def test_masks_change_nothing(monkeypatch):
    fast, slow = cnn(), cnn()
    train(Eva(fast.model, weight_decay=0.1), fast, fast.batches)
    for module in (eva, linalg, momentum):
        monkeypatch.setattr(module, "known_true", lambda _: False)
    train(Eva(slow.model, weight_decay=0.1), slow, slow.batches)
    # the same sums, but fused differently
    torch.testing.assert_close(weights(fast.model), weights(slow.model), rtol=1e-12, atol=1e-14)


def test_resume_is_exact(tmp_path):
    whole, half = cnn(), cnn()
    train(Eva(whole.model, update_every=2), whole, whole.batches[:7])
    opt = Eva(half.model, update_every=2)
    train(opt, half, half.batches[:3])
    torch.save((half.model.state_dict(), opt.state_dict()), tmp_path / "saved.pt")
    weights_then, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed = cnn()
    resumed.model.load_state_dict(weights_then)
    opt = Eva(resumed.model, update_every=2)
    opt.load_state_dict(state)
    train(opt, resumed, resumed.batches[3:7])
    assert torch.equal(weights(whole.model), weights(resumed.model))


@pytest.mark.parametrize("kl_clip", [0, -1.0, float("nan")])
def test_a_clip_is_positive(kl_clip):
    with pytest.raises(ValueError, match="kl_clip must be positive, or None"):
        Eva(nn.Linear(2, 2), kl_clip=kl_clip)
