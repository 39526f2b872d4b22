"""MBF against a slow dense oracle, and its mini-blocks against the exact empirical Fisher."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from kronscope.diag import live
from kronscope.diag.operators import dense as as_matrix
from kronscope.optim.capture import positions
from kronscope.optim.methods.mbf import mbf, mini_blocks
from kronscope.optim.methods.mbf.mbf import MBF
from tests.optim.models import CASES
from tests.optim.oracles import ORACLES

ORACLE = ORACLES["MBF"]
STEPS = 7
VARIANTS = [
    {"estimator": estimator, "fc_group": group, "fc_share": share}
    for estimator in ("minibatch", "per_example")
    for group in ("output", "input")
    for share in (True, False)
]
CONV_SHARES = [
    {"estimator": estimator, "conv_share": share}
    for estimator in ("minibatch", "per_example")
    for share in ("output", "all")
]
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
@pytest.mark.parametrize(
    ("variant", "hyper"), list(zip(VARIANTS + CONV_SHARES, SETTINGS * 4, strict=True))
)
def test_follows_the_oracle(name, variant, hyper):
    case = CASES[name]()
    oracle = ORACLE(copy.deepcopy(case.model), case.loss, lr=0.02, **variant, **hyper)
    own = {{"decoupled": "decoupled_weight_decay"}.get(k, k): v for k, v in hyper.items()}
    opt = MBF(case.model, lr=0.02, **variant, **own)
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


def per_example_gradients(case, batch):
    """{name: [m, O * (in+1)]} of each layer, by vmap over single examples."""
    x, t = batch
    parameters = {n: p.detach() for n, p in case.model.named_parameters()}

    def one(parameters, x, t):
        stand_in = lambda inputs: functional_call(case.model, parameters, (inputs,))  # noqa: E731
        return case.loss(stand_in, (x[None], t[None]))

    each = vmap(grad(one), (None, 0, 0))(parameters, x, t)
    found = {}
    for name, layer in case.model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            parts = [each[f"{name}.weight"].flatten(2)]
            if layer.bias is not None:
                parts.append(each[f"{name}.bias"][:, :, None])
            found[name] = torch.cat(parts, 2).flatten(1)
    return found


@pytest.mark.parametrize("name", sorted(CASES))
def test_mini_blocks_are_sub_blocks_of_the_exact_empirical_fisher(name):
    case = CASES[name]()
    batch = case.batches[0]
    V = per_example_gradients(case, batch)
    opt = MBF(case.model, lr=0.0, decay=0.0, estimator="per_example", fc_share=False)
    train(opt, case, [batch])
    for name, curvature in opt.curvature().items():
        exact = V[name].T @ V[name] / len(V[name])
        start = 0
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


@pytest.mark.parametrize("estimator", mbf.ESTIMATORS)
@pytest.mark.parametrize("fc_group", mbf.GROUPS)
def test_shared_is_the_mean_of_unshared(estimator, fc_group):
    held = {}
    for share in (True, False):
        case = CASES["shared"]()
        opt = MBF(case.model, lr=0.0, estimator=estimator, fc_group=fc_group, fc_share=share)
        train(opt, case, case.batches[:2])
        held[share] = [opt.state[p]["M"] for p in case.model.parameters() if p.ndim == 2]
    for mean, each in zip(held[True], held[False], strict=True):
        torch.testing.assert_close(mean, each.mean(0))


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_small_pieces_micro_batches_and_masks_change_nothing(name, variant, monkeypatch):
    plain, other = CASES[name](), CASES[name]()
    opt = MBF(plain.model, lr=0.02, **variant)
    train(opt, plain, plain.batches[:3])
    twin = MBF(other.model, lr=0.02, **variant)
    monkeypatch.setattr(positions, "PIECE", 1)
    monkeypatch.setattr(mbf, "known_true", lambda _: False)
    for x, t in other.batches[:3]:
        twin.zero_grad()
        for part in (slice(0, 5), slice(5, 8)):
            share = len(x[part]) / len(x)
            backward(other, (x[part], t[part]), share)
        twin.step()
    # the same sums in another order
    torch.testing.assert_close(weights(plain.model), weights(other.model), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_frozen_step_is_what_the_preconditioner_says(name, variant):
    case = CASES[name]()
    opt = MBF(case.model, lr=0.1, momentum=0.0, **variant)
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


@pytest.mark.parametrize("estimator", mbf.ESTIMATORS)
@pytest.mark.parametrize("stop", range(1, 5))
def test_resume_is_exact(estimator, stop):
    case = CASES["cnn"]()
    settings = {"estimator": estimator, "update_every": 2, "refresh_every": 3, "stagger": True}
    opt = MBF(case.model, **settings)
    train(opt, case, case.batches[:stop])
    other = CASES["cnn"]()
    other.model.load_state_dict(case.model.state_dict())
    again = MBF(other.model, **settings)
    again.load_state_dict(copy.deepcopy(opt.state_dict()))
    for o, c in ((opt, case), (again, other)):
        train(o, c, c.batches[stop : stop + 4])
    assert torch.equal(weights(case.model), weights(other.model))


@pytest.mark.parametrize("estimator", mbf.ESTIMATORS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_bad_gradients_leave_the_state_alone(estimator, bad, name):
    """Of 1e200 only the square is not finite: the step is taken, the mini-blocks stay."""
    case = CASES[name]()
    opt = MBF(case.model, lr=1e-3, estimator=estimator)
    train(opt, case, case.batches[:2])
    first = next(iter(case.model.parameters()))
    held = opt.state[first]["M"].clone()
    opt.zero_grad()
    backward(case, case.batches[2], bad)
    opt.step()
    assert torch.equal(opt.state[first]["M"], held)
    assert opt.state[first]["counts"][mbf.COUNTS.index("not finite")] > 0
    for state in opt.state.values():
        assert all(torch.isfinite(v).all() for v in state.values())


def test_warm_up_is_the_mean_over_batches():
    for estimator in mbf.ESTIMATORS:
        case = CASES["cnn"]()
        opt = MBF(case.model, estimator=estimator)
        before = weights(case.model)
        opt.warm_up([partial(backward, case, batch) for batch in case.batches[:3]])
        assert all(p.grad is None for p in case.model.parameters())
        assert torch.equal(weights(case.model), before)
        oracle = ORACLE(case.model, case.loss, lr=0.1, damping=0.1, estimator=estimator)
        oracle.warm_up(case.batches[:3])
        for name, curvature in opt.curvature().items():
            torch.testing.assert_close(dense(curvature), oracle.curvature[name])


def test_warm_up_needs_backward():
    case = CASES["mlp"]()
    x, _ = case.batches[0]
    with pytest.raises(ValueError, match="each closure must run the whole model, and backward"):
        MBF(case.model).warm_up([lambda: case.model(x)])


def test_minibatch_needs_no_hooks():
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
    assert state["counts"][mbf.COUNTS.index("failed inverses")] == 2
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


@pytest.mark.parametrize("variant", VARIANTS[:4], ids=lambda v: "-".join(map(str, v.values())))
def test_diag_reads_it(variant):
    case = CASES["cnn"]()
    opt = MBF(case.model, **variant)
    train(opt, case, case.batches[:1])
    for name, P in live.preconditioners(opt).items():
        torch.testing.assert_close(as_matrix(P), dense(opt.preconditioner()[name]))


def test_huge_unshared_blocks_are_refused():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(2000, 2000, device="meta"))
    with pytest.raises(ValueError, match=r"128\.1 GB .* layer '1' .* use fc_share=True"):
        MBF(model, fc_share=False)
    MBF(model)


def test_bad_names_are_refused():
    with pytest.raises(ValueError, match=r"no estimator 'batch'; known: \['minibatch', 'per_ex"):
        MBF(nn.Linear(2, 2), estimator="batch")
    with pytest.raises(ValueError, match=r"no fc_group 'row'; known: \['output', 'input'\]"):
        MBF(nn.Linear(2, 2), fc_group="row")
