"""What Shampoo and TNT have in common: parameters as tensors, axes, failures, resuming."""

import copy

import pytest
import torch
from torch import nn

from kronscope.optim.core import axes
from kronscope.optim.methods.shampoo.shampoo import Shampoo
from kronscope.optim.methods.tnt.tnt import TNT
from tests.optim.models import CASES as MODELS

MAKE = {
    "shampoo": lambda model, _, **kw: Shampoo(model, **{"lr": 0.02, "damping": 0.1, **kw}),
    "tnt": lambda model, likelihood, **kw: TNT(
        model, likelihood=likelihood, **{"lr": 0.02, "damping": 0.6, **kw}
    ),
}
RESULT = {"shampoo": "root", "tnt": "inverse"}
every = pytest.mark.parametrize("method", sorted(MAKE))


@pytest.fixture
def short(monkeypatch):
    """Axes longer than 8 get no matrix."""
    monkeypatch.setattr(axes, "LONGEST", 8)


def setup(method, case="cnn", **settings):
    made = MODELS[case]()
    torch.manual_seed(3)
    return made, MAKE[method](made.model, made.likelihood, **settings)


def train(case, opt, batches):
    for batch in batches:
        opt.zero_grad()
        case.loss(case.model, batch).backward()
        opt.step()


def tensors(opt):
    return [v for state in opt.state.values() for v in state.values()]


@pytest.mark.usefixtures("short")
def test_shapes_of_variables():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(3, 2),
            "conv": nn.Conv2d(4, 6, (3, 2), groups=2),
            "conv1d": nn.Conv1d(4, 6, 5),
            "lstm": nn.LSTM(2, 3),
            "norm": nn.GroupNorm(2, 4),
            "table": nn.Embedding(9, 2),
        }
    )
    model.position = nn.Parameter(torch.zeros(1, 4, 5))
    model.scale = nn.Parameter(torch.ones(()))
    shapes = {v.name: v.shape for v in axes.variables(model)}
    assert shapes["linear.weight"] == (2, 3)
    assert shapes["linear.bias"] == (2,)
    assert shapes["conv.weight"] == (6, 2, 6)
    assert shapes["conv1d.weight"] == (6, 4, 5)
    assert shapes["lstm.weight_hh_l0"] == (12, 3)
    assert shapes["norm.weight"] == (4,)
    assert shapes["position"] == (20,)
    assert shapes["scale"] == (1,)
    lacking = {v.name: v.axes for v in axes.variables(model) if len(v.axes) < len(v.shape)}
    assert lacking == {
        "lstm.weight_ih_l0": (1,),
        "lstm.weight_hh_l0": (1,),
        "lstm.bias_ih_l0": (),
        "lstm.bias_hh_l0": (),
        "table.weight": (1,),
        "position": (),
    }


def test_contractions_and_products():
    G = torch.randn(2, 3, 4, 5)
    for i, spec in enumerate(["bijk,bljk->bil", "bijk,bilk->bjl", "bijk,bijl->bkl"]):
        flat = axes.unfolded(G, i)
        torch.testing.assert_close(flat.mT @ flat, torch.einsum(spec, G, G))
    for i, spec in enumerate(["bli,bijk->bljk", "blj,bijk->bilk", "blk,bijk->bijl"]):
        A = torch.randn(2, G.shape[i + 1], G.shape[i + 1])
        A = A + A.mT
        torch.testing.assert_close(axes.along(G, i, A), torch.einsum(spec, A, G))


@pytest.mark.usefixtures("short")
@every
@pytest.mark.parametrize("case", sorted(MODELS))
def test_a_frozen_step_is_the_preconditioned_gradient(method, case):
    made, opt = setup(method, case, momentum=0.0)
    train(made, opt, made.batches[:3])
    with opt.frozen():
        opt.zero_grad()
        made.loss(made.model, made.batches[3]).backward()
        P = opt.preconditioner()
        before = {n: p.detach().clone() for n, p in made.model.named_parameters()}
        held = [t.clone() for t in tensors(opt)]
        opt.step()
    for name, p in made.model.named_parameters():
        expected = P[name] @ p.grad.reshape(-1) if name in P else p.grad.reshape(-1)
        torch.testing.assert_close((p - before[name]).reshape(-1), -0.02 * expected)
    moved = [s["momentum"] for s in opt.state.values()]
    for t, old in zip(tensors(opt), held, strict=True):
        assert torch.equal(t, old) or any(t is m for m in moved)


@pytest.mark.usefixtures("short")
@every
def test_long_axes_have_no_matrix(method):
    model = nn.Sequential(nn.Embedding(9, 3), nn.Flatten(), nn.Linear(6, 9))
    twin = copy.deepcopy(model)
    opt = MAKE[method](model, "categorical", weight_decay=0.1)
    plain = torch.optim.SGD([twin[2].bias], lr=0.02, momentum=0.9)
    x, t = torch.randint(9, (5, 2)), torch.randint(9, (5,))
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), t).backward()
        twin[2].bias.grad = model[2].bias.grad.clone()
        opt.step()
        twin[2].bias.data.mul_(1 - 0.02 * 0.1)
        plain.step()
    torch.testing.assert_close(model[2].bias, twin[2].bias)
    P = opt.preconditioner()
    assert sorted(P) == ["0.weight", "2.weight"]
    assert [P["0.weight"].left.shape, P["2.weight"].left.shape] == [(9, 9), (9, 9)]
    torch.testing.assert_close(P["0.weight"].left @ torch.eye(9), torch.eye(9))
    state = opt.state[model[0].weight]
    assert "H_1" not in state
    assert state["H_2"].shape == (3, 3)
    text = opt.summary()
    assert "axes [9, 3], no matrix on long axes: 9" in text
    assert "plain rule: axes too long for a matrix: 9" in text


@every
def test_warm_up_comes_first_and_leaves_no_trace(method):
    made, opt = setup(method, "mlp")
    model, before = made.model, [p.detach().clone() for p in made.model.parameters()]
    opt.warm_up([lambda b=b: made.loss(model, b).backward() for b in made.batches[:3]])
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert opt.param_groups[0]["step"] == 0
    assert opt.preconditioner()
    train(made, opt, made.batches[:1])
    with pytest.raises(RuntimeError, match="before the first step"):
        opt.warm_up([lambda: None])
    made, opt = setup(method, "mlp")
    with pytest.raises(ValueError, match=r"parameter '0\.weight' .*warm_up"):
        opt.warm_up([lambda: None])
    with pytest.raises(ValueError, match="no batch"):
        opt.warm_up([])


@every
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_gradient_changes_no_average(method, bad):
    made, opt = setup(method, decoupled_weight_decay=False)
    train(made, opt, made.batches[:2])
    x, t = made.batches[2]
    x = x.clone()
    x[0, 0, 0, 0] = bad
    held = [t.clone() for t in tensors(opt)]
    weights = [p.detach().clone() for p in made.model.parameters()]
    train(made, opt, [(x, t)])
    state = opt.state[made.model[0].weight]
    assert state["counts"][0] == 2
    assert state["counts"][3] >= 1
    assert all(bool(torch.isfinite(t).all()) for t in tensors(opt))
    assert all(bool(torch.isfinite(p).all()) for p in made.model.parameters())
    for name in ("H_1", "H_2", "H_3"):
        assert any(torch.equal(state[name], old) for old in held)
    train(made, opt, made.batches[3:5])
    assert state["counts"][0] == 4
    assert not torch.equal(weights[0], made.model[0].weight)


@every
def test_failures_keep_the_last_good_result_then_stop(method):
    made, opt = setup(method, "mlp", refresh_every=1)
    train(made, opt, made.batches[:2])
    state, result = opt.state[made.model[0].weight], f"{RESULT[method]}_2"
    good = state[result].clone()
    for _ in range(2):
        state["H_2"].copy_(-1e8 * torch.eye(6))
        train(made, opt, made.batches[2:3])
        assert torch.equal(state[result], good)
    assert state["counts"][2] == 2
    state["H_2"].copy_(-1e8 * torch.eye(6))
    with pytest.raises(RuntimeError, match=r"'0\.weight'.*3 times in a row; raise the damping"):
        train(made, opt, made.batches[2:3])


@every
@pytest.mark.parametrize("stagger", [False, True])
def test_resume_is_bit_exact(method, stagger):
    settings = {"update_every": 2, "refresh_every": 3, "stagger": stagger}
    for phase in range(5):
        made, opt = setup(method, **settings)
        train(made, opt, made.batches[:phase])
        other, again = setup(method, **settings)
        other.model.load_state_dict(copy.deepcopy(made.model.state_dict()))
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
        train(made, opt, made.batches[phase : phase + 4])
        train(other, again, other.batches[phase : phase + 4])
        for a, b in zip(made.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(a, b)


class Spare(nn.Module):
    """Three equal layers of which the forward uses two."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x):
        return self.layers[1](torch.tanh(self.layers[0](x)))


@every
def test_equal_shapes_go_together_and_may_sit_out(method):
    model = Spare()
    opt = MAKE[method](model, "gaussian")
    assert [len(stack.blocks) for stack in opt._harness.stacks] == [3, 3]
    before = model.layers[2].weight.detach().clone()
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(4, 3)).square().sum(1).mean().backward()
        opt.step()
    names = [f"layers.{i}.{p}" for i in (0, 1) for p in ("bias", "weight")]
    assert sorted(opt.preconditioner()) == names
    assert torch.equal(model.layers[2].weight, before)


@every
def test_a_tied_weight_is_one_variable(method):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    opt = MAKE[method](model, "gaussian")
    opt.zero_grad()
    model(torch.randn(4, 3)).square().sum(1).mean().backward()
    opt.step()
    assert sorted(opt.preconditioner()) == ["0.bias", "0.weight", "2.bias"]


@every
def test_sparse_gradients_are_refused(method):
    model = nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2))
    opt = MAKE[method](model, "gaussian")
    with pytest.raises(ValueError, match="sparse"):
        opt.step(lambda: model(torch.randint(9, (5, 2))).square().sum(1).mean().backward())


@every
def test_parameters_that_join_later_get_their_axes(method):
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    opt = MAKE[method](model, "gaussian")
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(4, 3)).square().sum(1).mean().backward()
        opt.step()
        if not model[0].weight.requires_grad:
            model[0].requires_grad_(True)
            opt.add_param_group({"params": list(model[0].parameters()), "lr": 0.01})
    assert "0.weight" in opt.preconditioner()
