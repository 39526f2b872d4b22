"""Problem: what it refuses, and that measuring leaves everything as it was."""

import copy

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, approximations, exact, metrics


def data(n=6):
    return torch.randn(n, 4), torch.randint(3, (n,))


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_a_sum_is_refused_and_named():
    x, t = data()
    with pytest.raises(ValueError, match=r"CrossEntropyLoss is not a mean.*reduction='sum'"):
        Problem(net(), nn.CrossEntropyLoss(reduction="sum"), x, t)
    with pytest.raises(ValueError, match="not a mean over examples"):
        Problem(net(), nn.CrossEntropyLoss(reduction="sum"), x[:1], t[:1])


def test_a_weighted_mean_is_refused():
    x, t = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 1])
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 1.0]))
    with pytest.raises(ValueError, match="class weights or ignore_index"):
        Problem(net(), loss, x, t)


def test_no_reduction_is_refused():
    x, t = data()
    with pytest.raises(ValueError, match=r"one number.*returned \(6,\)"):
        Problem(net(), nn.CrossEntropyLoss(reduction="none"), x, t)


class Mixing(nn.Module):
    """Centres by the batch: examples are not independent."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return self.layer(x - x.mean(0))


def test_a_model_that_mixes_examples_is_refused():
    with pytest.raises(ValueError, match="mixes examples"):
        Problem(Mixing(), nn.CrossEntropyLoss(), *data())


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_a_random_model_is_refused_and_its_layer_named():
    model = nn.Sequential(nn.Linear(4, 4), Noisy(), nn.Linear(4, 3))
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"not deterministic.*layer '1'"):
        Problem(model, nn.CrossEntropyLoss(), *data())
    # the data were drawn after `before` was read: draw them again from there
    torch.set_rng_state(before)


def test_non_finite_values_are_named():
    x, t = data()
    bad = x.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="inputs hold NaN or Inf, first in example 3"):
        Problem(net(), nn.CrossEntropyLoss(), bad, t)
    model = net()
    with torch.no_grad():
        model[2].bias[0] = torch.inf
    with pytest.raises(ValueError, match=r"parameter '2.bias' holds NaN or Inf"):
        Problem(model, nn.CrossEntropyLoss(), x, t)

    class Root(nn.Module):
        def forward(self, z):
            return z.sqrt()

    with pytest.raises(ValueError, match="outputs hold NaN or Inf, first at layer '1'"):
        Problem(nn.Sequential(nn.Linear(4, 3), Root()), nn.CrossEntropyLoss(), x, t)


def test_shapes_that_do_not_fit():
    x, t = data()
    with pytest.raises(ValueError, match="batch is empty"):
        Problem(net(), nn.CrossEntropyLoss(), x[:0], t[:0])
    with pytest.raises(ValueError, match="6 inputs but targets"):
        Problem(net(), nn.CrossEntropyLoss(), x, t[:4])
    with pytest.raises(ValueError, match="must be tensors"):
        Problem(net(), nn.CrossEntropyLoss(), [1.0], t)


def test_unknown_frozen_and_unused_blocks():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head, self.spare = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(2, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    model = Partly()
    model.body.requires_grad_(False)
    problem = Problem(model, nn.CrossEntropyLoss(), *data())
    assert [b.name for b in problem.blocks()] == ["head"]
    with pytest.raises(ValueError, match=r"no block 'haed'; known: \['head'\]"):
        problem.block("haed")
    with pytest.raises(ValueError, match=r"layer 'body' is frozen: body.weight, body.bias"):
        problem.block("body")
    with pytest.raises(ValueError, match="layer 'spare' is unused"):
        problem.block("spare")
    with pytest.raises(ValueError, match=r"no block 'head\[9\]'"):
        problem.block("head[9]")
    with pytest.raises(ValueError, match="no blocks by 'colour'; known"):
        problem.blocks(by="colour")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        Problem(model, nn.CrossEntropyLoss(), *data())


def test_dropout_and_batch_norm_are_measured_in_eval_mode_and_said_so():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match="measured in eval mode"):
        problem = Problem(model, nn.CrossEntropyLoss(), *data())
    assert len(problem.notes) == 1
    assert model.training
    assert Problem(model.eval(), nn.CrossEntropyLoss(), *data()).notes == []


class Auxiliary(nn.Module):
    """Returns a second output while it trains, as Inception does."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return (self.layer(x), x) if self.training else self.layer(x)


def test_a_model_that_cannot_be_seen_in_train_mode():
    x, t = data(1)
    norm = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    with pytest.warns(UserWarning, match=r"train mode it could not be evaluated \(ValueError: Exp"):
        problem = Problem(norm, nn.CrossEntropyLoss(), x, t)
    assert len(problem.notes) == 1
    exact.ggn(problem, problem.block("0"))
    with pytest.warns(UserWarning, match=r"train mode it could not be evaluated \(TypeError"):
        problem = Problem(Auxiliary(), nn.CrossEntropyLoss(), *data())
    assert len(problem.notes) == 1


def test_a_weight_made_by_a_hook_is_refused():
    with pytest.warns(FutureWarning):
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(ValueError, match=r"layer '0'.*parametrizations"):
        Problem(model, nn.CrossEntropyLoss(), *data())


def test_blocks_count_entries_in_the_order_of_w_bar():
    problem = Problem(net(), nn.CrossEntropyLoss(), *data())
    block = problem.block("0")
    W, b = problem.model.get_parameter("0.weight"), problem.model.get_parameter("0.bias")
    v = block.join({"0.weight": W, "0.bias": b})
    torch.testing.assert_close(v, torch.cat([W, b[:, None]], 1).reshape(-1))
    back = block.split(v)
    torch.testing.assert_close(back["0.weight"], W)
    torch.testing.assert_close(back["0.bias"], b)
    unit = problem.block("0[2]")
    torch.testing.assert_close(unit.join({"0.weight": W, "0.bias": b}), torch.cat([W[2], b[2:3]]))
    alone = unit.split(torch.ones(unit.d))
    assert alone["0.weight"].sum() == 4
    assert alone["0.bias"].tolist() == [0, 0, 1, 0, 0]


def test_measuring_leaves_everything_bit_for_bit():
    """Parameters, .grad, buffers, hooks, mode, RNG, optimizer state."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    x, t = data()
    loss = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters())
    loss(model(x), t).backward()
    optimizer.step()
    calls.clear()
    x_before, t_before = x.clone(), t.clone()
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    kept = copy.deepcopy(optimizer.state_dict())
    rng = torch.get_rng_state()

    with (
        pytest.warns(UserWarning, match="eval mode"),
        pytest.warns(UserWarning, match="hooks of layer '0'"),
    ):
        problem = Problem(model, loss, x, t)
    for block in problem.blocks():
        for of in exact.TRUTHS:
            truth = exact.truth(problem, block, of)
            approx = approximations.diagonal(problem, block, of=of)
            metrics.relative_error(truth, approx)
            metrics.step_cosine(truth, approx, damping=1.0, gradient=problem.gradient(block))
    metrics.noise_floor(exact.ggn(problem, problem.block("0")))

    assert calls == []
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(x, x_before)
    assert torch.equal(t, t_before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    for key, slot in optimizer.state_dict()["state"].items():
        for name, tensor in slot.items():
            assert torch.equal(tensor, kept["state"][key][name])
    assert len(model[0]._forward_hooks) == 1
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


def test_remembering_is_bounded():
    # a quarter of the budget is kept: less than two of these truths, more than one
    problem = Problem(net(), nn.CrossEntropyLoss(), *data(), budget=4_000)
    first = exact.ggn(problem, problem.block("0"))
    assert exact.ggn(problem, problem.block("0")) is first
    exact.ggn(problem, problem.block("2"))
    assert exact.ggn(problem, problem.block("0")) is not first


def test_a_copy_in_another_dtype():
    model = net().float()
    x, t = data()
    problem = Problem(model, nn.CrossEntropyLoss(), x.float(), t, dtype=torch.float64)
    assert problem.gradient(problem.block("0")).dtype == torch.float64
    assert model[0].weight.dtype == torch.float32
