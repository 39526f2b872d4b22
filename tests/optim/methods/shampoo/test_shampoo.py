"""Shampoo against a slow dense oracle, and its exponents."""

import pytest
import torch

from kronscope.optim.methods.shampoo import roots
from kronscope.optim.methods.shampoo.shampoo import Shampoo
from tests.optim.models import CASES as MODELS
from tests.optim.oracles import ORACLES

ORACLE = ORACLES["Shampoo"]
SETTINGS = {
    "plain": {},
    "rare": {"update_every": 2, "refresh_every": 3, "decay": 0.6},
    "coupled": {"weight_decay": 0.05, "decoupled_weight_decay": False, "momentum": 0.5},
    "decoupled": {"weight_decay": 0.05, "update_every": 3},
    "early": {"refresh_early": True, "update_every": 2, "refresh_every": 5},
}


def dense(map_):
    return map_ @ torch.eye(map_.shape[0])


def train(case, opt, batches):
    for batch in batches:
        opt.zero_grad()
        case.loss(case.model, batch).backward()
        opt.step()


def pair(case, **settings):
    """The optimizer and its oracle on the same model."""
    settings = {"lr": 0.02, "damping": 0.05, "refresh_every": 2, **settings}
    opt = Shampoo(case.model, **settings)
    settings["decoupled"] = settings.pop("decoupled_weight_decay", None)
    return opt, ORACLE(case.model, case.loss, **settings)


def same(case, opt, oracle):
    """Weights, preconditioner and curvature to rounding of two orders of the same sums."""
    for own, other in zip(case.model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    P, B = opt.preconditioner(), opt.curvature()
    assert P.keys() == B.keys() == oracle.P.keys()
    for name, right in oracle.P.items():
        torch.testing.assert_close(dense(P[name]), right, rtol=1e-9, atol=1e-10)
        # roots of eigenvalues just above what counts as rounding carry errors of its root
        torch.testing.assert_close(dense(B[name]), oracle.curvature[name], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("case", sorted(MODELS))
def test_eight_steps_of_the_oracle(case, settings):
    made = MODELS[case]()
    opt, oracle = pair(made, **SETTINGS[settings])
    train(made, opt, made.batches[:8])
    for batch in made.batches[:8]:
        oracle.step(batch)
    same(made, opt, oracle)


def test_warm_up_then_the_first_step_leaves_the_averages():
    made = MODELS["cnn"]()
    opt, oracle = pair(made)
    # closures need not clear gradients: they count alone all the same
    opt.warm_up([lambda b=b: made.loss(made.model, b).backward() for b in made.batches[:3]])
    oracle.warm_up(made.batches[:3])
    held = opt.state[made.model[0].weight]["H_1"].clone()
    train(made, opt, made.batches[3:4])
    assert torch.equal(opt.state[made.model[0].weight]["H_1"], held)
    train(made, opt, made.batches[4:7])
    for batch in made.batches[3:7]:
        oracle.step(batch)
    same(made, opt, oracle)


def test_exponents():
    """-1/4 for a matrix, -1/6 for a convolution's three axes, -1/2 for a vector."""
    made = MODELS["cnn"]()
    opt = Shampoo(made.model, damping=0.01, decay=0.0)
    train(made, opt, made.batches[:1])
    last, first = made.model[6], made.model[0]
    for p, exponent in ((last.weight, -1 / 4), (first.weight, -1 / 6), (first.bias, -1 / 2)):
        flat = p.grad.flatten(2) if p.ndim == 4 else p.grad
        for i in range(flat.ndim):
            rows = flat.movedim(i, 0).reshape(flat.shape[i], -1)
            values, U = torch.linalg.eigh(rows @ rows.T)
            expected = U @ torch.diag((values.clamp_min(0) + 0.01) ** exponent) @ U.T
            torch.testing.assert_close(opt.state[p][f"root_{i + 1}"], expected)


def test_the_route_of_a_gpu(monkeypatch):
    """Roots by products, with errors up to 1e-6, give the steps that eigenvalues give."""
    cpu, gpu = MODELS["cnn"](), MODELS["cnn"]()
    train(cpu, Shampoo(cpu.model, lr=0.02, damping=0.05, refresh_every=2), cpu.batches[:6])
    monkeypatch.setattr(roots, "free_to_read", lambda _: False)
    train(gpu, Shampoo(gpu.model, lr=0.02, damping=0.05, refresh_every=2), gpu.batches[:6])
    for a, b in zip(cpu.model.parameters(), gpu.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_periods_and_counts():
    made = MODELS["mlp"]()
    opt = Shampoo(made.model, update_every=2, refresh_every=3)
    train(made, opt, made.batches[:8])
    # updates at 0, 2, 4, 6, roots at 0, 3, 6
    assert opt.state[made.model[0].weight]["counts"].tolist() == [4, 3, 0, 0]
    assert opt.param_groups[0]["step"] == 8


def test_micro_batches_equal_the_whole():
    made, split = MODELS["cnn"](), MODELS["cnn"]()
    one, many = (Shampoo(c.model, lr=0.02, damping=0.05, refresh_every=2) for c in (made, split))
    for x, t in made.batches[:4]:
        one.zero_grad()
        made.loss(made.model, (x, t)).backward()
        one.step()
        many.zero_grad()
        for part in (slice(0, 3), slice(3, 8)):
            (split.loss(split.model, (x[part], t[part])) * len(x[part]) / len(x)).backward()
        many.step()
    for a, b in zip(made.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bad", [{"damping": 0.0}, {"update_every": 0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Shampoo(MODELS["mlp"]().model, **bad)
