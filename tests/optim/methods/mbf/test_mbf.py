"""MBF against a slow dense oracle, and its mini-blocks against outer products of gradients."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.diag import live
from kronscope.diag.operators import dense as as_matrix
from kronscope.optim.methods.mbf import mbf, mini_blocks
from kronscope.optim.methods.mbf.mbf import MBF
from tests.optim.models import CASES
from tests.optim.oracles import ORACLES

ORACLE = ORACLES["MBF"]
STEPS = 7
NOT_FINITE, FAILED = MBF.counts.index("not finite"), MBF.counts.index("failed inverses")
SETTINGS = [
    {"damping": 0.3, "refresh_every": 2},
    {"damping": 0.1, "weight_decay": 0.5, "update_every": 2, "refresh_every": 3, "decay": 0.5},
    {"damping": 0.2, "weight_decay": 0.3, "decoupled": False, "momentum": 0.5, "refresh_every": 1},
]


def backward(case, batch, weight=1.0):
    (weight * case.loss(case.model, batch)).backward()


def train(opt, case, batches):
    for batch in batches:
        opt.zero_grad()
        backward(case, batch)
        opt.step()


def dense(P):
    return P @ torch.eye(P.shape[0])


def weights(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).clone()


def w_bar(layer, of=lambda p: p.detach()):
    parts = [of(layer.weight).flatten(1)]
    return torch.cat(parts + ([of(layer.bias)[:, None]] if layer.bias is not None else []), 1)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("hyper", SETTINGS, ids=["plain", "decoupled", "coupled"])
def test_follows_the_oracle(name, hyper):
    case = CASES[name]()
    oracle = ORACLE(copy.deepcopy(case.model), case.loss, lr=0.02, **hyper)
    own = {{"decoupled": "decoupled_weight_decay"}.get(k, k): v for k, v in hyper.items()}
    opt = MBF(case.model, lr=0.02, **own)
    for batch in case.batches[:STEPS]:
        train(opt, case, [batch])
        oracle.step(batch)
        for mine, other in zip(case.model.parameters(), oracle.model.parameters(), strict=True):
            # two orders of the same sums, seven steps, blocks of condition below 1e3
            torch.testing.assert_close(mine, other, rtol=1e-10, atol=1e-12)
    assert set(opt.preconditioner()) == set(oracle.P)
    for name, P in opt.preconditioner().items():
        torch.testing.assert_close(dense(P), oracle.P[name], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(dense(opt.curvature()[name]), oracle.curvature[name])


@pytest.mark.parametrize("name", sorted(CASES))
def test_mini_blocks_are_sub_blocks_of_the_outer_product(name):
    """Of a batch of one example the empirical Fisher; for rows of a Linear layer their mean."""
    case = CASES[name]()
    opt = MBF(case.model, lr=0.0, decay=0.0)
    train(opt, case, [tuple(part[:1] for part in case.batches[0])])
    for name, curvature in opt.curvature().items():
        layer = case.model.get_submodule(name)
        G = w_bar(layer, lambda p: p.grad)
        if isinstance(layer, nn.Linear):
            torch.testing.assert_close(curvature.right, G.T @ G / len(G))
            continue
        exact, start = torch.outer(G.reshape(-1), G.reshape(-1)), 0
        for block in curvature.blocks:
            stop = start + len(block)
            torch.testing.assert_close(block, exact[start:stop, start:stop])
            start = stop
        assert start == len(exact)


def test_a_convolution_is_cut_into_kernels_and_biases():
    case = CASES["cnn"]()
    opt = MBF(case.model)
    train(opt, case, case.batches[:1])
    sizes = [len(M) for M in opt.preconditioner()["0"].blocks]
    assert sizes == 4 * [9, 9, 1]
    state = opt.state[case.model[2].weight]  # two groups of 2 -> 2 channels
    assert state["M"].shape == (2, 2, 2, 9, 9)
    assert state["M_bias"].shape == (2, 2, 1, 1)


def test_kernels_of_other_shapes_keep_apart():
    """Of [O, 10] each, these would fall into one stack by their shape alone."""
    torch.manual_seed(0)
    kinds = [nn.Conv2d(9, 2, 1), nn.Conv2d(1, 2, 3), nn.Conv2d(10, 2, 1, bias=False)]
    model = nn.ModuleList(kinds)
    x = [torch.randn(4, c, 3, 3) for c in (9, 1, 10)]
    opt = MBF(model, damping=0.5, momentum=0.0)
    sum(layer(x).square().mean() for layer, x in zip(model, x, strict=True)).backward()
    before = [w_bar(layer) for layer in model]
    opt.step()
    for layer, old, P in zip(model, before, opt.preconditioner().values(), strict=True):
        change = -1e-3 * (P @ w_bar(layer, lambda p: p.grad).reshape(-1)).reshape(old.shape)
        torch.testing.assert_close(w_bar(layer) - old, change)
    assert [opt.state[m.weight]["M"].shape[-1] for m in model] == [1, 9, 1]


@pytest.mark.parametrize("name", sorted(CASES))
def test_micro_batches_and_masks_change_nothing(name, monkeypatch):
    plain, other = CASES[name](), CASES[name]()
    train(MBF(plain.model, lr=0.02), plain, plain.batches[:3])
    twin = MBF(other.model, lr=0.02)
    monkeypatch.setattr(mbf, "known_true", lambda _: False)
    for x, t in other.batches[:3]:
        twin.zero_grad()
        for part in (slice(0, 5), slice(5, 8)):
            backward(other, (x[part], t[part]), len(x[part]) / len(x))
        twin.step()
    # the same sums in another order
    torch.testing.assert_close(weights(plain.model), weights(other.model), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES))
def test_frozen_step_is_what_the_preconditioner_says(name):
    case = CASES[name]()
    opt = MBF(case.model, lr=0.1, momentum=0.0)
    train(opt, case, case.batches[:2])
    held = {n: dense(P) for n, P in opt.preconditioner().items()}
    layers = {n: case.model.get_submodule(n) for n in held}
    before = {n: w_bar(layer) for n, layer in layers.items()}
    with opt.frozen():
        train(opt, case, case.batches[2:3])
    for n, layer in layers.items():
        assert torch.equal(dense(opt.preconditioner()[n]), held[n])
        change = -0.1 * (held[n] @ w_bar(layer, lambda p: p.grad).reshape(-1))
        # W - (W - lr P ∇) loses digits of the change against those of W
        torch.testing.assert_close((w_bar(layer) - before[n]).reshape(-1), change)


@pytest.mark.parametrize("stop", range(1, 5))
def test_resume_is_exact(stop):
    case = CASES["cnn"]()
    settings = {"update_every": 2, "refresh_every": 3, "stagger": True}
    opt = MBF(case.model, **settings)
    train(opt, case, case.batches[:stop])
    other = CASES["cnn"]()
    other.model.load_state_dict(case.model.state_dict())
    again = MBF(other.model, **settings)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o, c in ((opt, case), (again, other)):
        train(o, c, c.batches[stop : stop + 4])
    assert torch.equal(weights(case.model), weights(other.model))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_bad_gradients_leave_the_state_alone(bad, name):
    """Of 1e200 only the square is not finite: the step is taken, the mini-blocks stay."""
    case = CASES[name]()
    opt = MBF(case.model, lr=1e-3)
    train(opt, case, case.batches[:2])
    first = next(iter(case.model.parameters()))
    held = opt.state[first]["M"].clone()
    opt.zero_grad()
    backward(case, case.batches[2], bad)
    opt.step()
    assert torch.equal(opt.state[first]["M"], held)
    assert opt.state[first]["counts"][NOT_FINITE] > 0
    for state in opt.state.values():
        assert all(torch.isfinite(v).all() for v in state.values())


def test_warm_up_is_the_mean_over_batches():
    case = CASES["cnn"]()
    opt = MBF(case.model)
    before = weights(case.model)
    opt.warm_up([partial(backward, case, batch) for batch in case.batches[:3]])
    assert all(p.grad is None for p in case.model.parameters())
    assert torch.equal(weights(case.model), before)
    oracle = ORACLE(case.model, case.loss, lr=0.1, damping=0.1)
    oracle.warm_up(case.batches[:3])
    for name, curvature in opt.curvature().items():
        torch.testing.assert_close(dense(curvature), oracle.curvature[name])


def test_warm_up_needs_backward():
    case = CASES["mlp"]()
    x, _ = case.batches[0]
    with pytest.raises(ValueError, match="each closure must run the whole model, and backward"):
        MBF(case.model).warm_up([lambda: case.model(x)])


def test_no_hooks_are_needed():
    """A weight used by a function is trained as well: all there is to know is in .grad."""
    layer = nn.Linear(3, 2)
    opt = MBF(layer)
    F.linear(torch.randn(4, 3), layer.weight, layer.bias).square().mean().backward()
    opt.step()
    assert set(opt.preconditioner()) == {""}
    assert not opt._harness.capture.totals


def test_failed_mini_blocks_keep_the_last_good_ones_then_stop():
    case = CASES["cnn"]()
    opt = MBF(case.model, refresh_every=1)
    train(opt, case, case.batches[:1])
    state = opt.state[case.model[0].weight]
    good = state["M_inv"].clone()
    for _ in range(2):
        state["M"][1, 0].copy_(-50 * torch.eye(9))
        train(opt, case, case.batches[:1])
        assert torch.equal(state["M_inv"], good)
    assert state["counts"][FAILED] == 2
    state["M"][1, 0].copy_(-50 * torch.eye(9))
    with pytest.raises(RuntimeError, match=r"layer '0'.*3 times in a row; raise the damping"):
        train(opt, case, case.batches[:1])


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [4, 300])
def test_rows_are_learned_in_place(size, biased):
    W, b = torch.randn(7, size), torch.randn(7) if biased else None
    G = torch.cat([W, b[:, None]], 1) if biased else W
    M = torch.randn(20, G.shape[1])
    M = M.T @ M
    expected = 0.8 * M + 0.2 * sum(torch.outer(g, g) for g in G) / 7
    mini_blocks.learn_rows_(M, W, b, 0.8)
    torch.testing.assert_close(M, expected)


def test_mini_inverse_of_numbers_and_of_matrices():
    for n in (1, 3):
        a = torch.randn(5, n, n)
        M, damping = a @ a.mT, torch.rand(5) + 0.1
        M[2] = -7 * torch.eye(n)
        inverse, ok = mini_blocks.mini_inverse(M, damping)
        assert ok.tolist() == [True, True, False, True, True]
        damped = M + damping[:, None, None] * torch.eye(n)
        torch.testing.assert_close(inverse[ok], torch.linalg.inv(damped[ok]))


def test_diag_reads_it():
    case = CASES["cnn"]()
    opt = MBF(case.model)
    train(opt, case, case.batches[:1])
    for name, P in live.preconditioners(opt).items():
        torch.testing.assert_close(as_matrix(P), dense(opt.preconditioner()[name]))


def test_options_and_states_of_earlier_versions():
    model = CASES["mlp"]().model
    with pytest.raises(TypeError, match=r"MBF takes no estimator=; MBF has one form: mini-batch"):
        MBF(model, estimator="minibatch")
    opt = MBF(model)
    state = opt.state_dict()
    state["param_groups"][0] |= {"estimator": "minibatch", "fc_share": True, "conv_share": "none"}
    opt.load_state_dict(state)
    assert "estimator" not in opt.param_groups[0]
    state["param_groups"][0]["fc_group"] = "input"
    with pytest.raises(ValueError, match=r"the state is of MBF\(fc_group='input'\); MBF has one"):
        opt.load_state_dict(state)
