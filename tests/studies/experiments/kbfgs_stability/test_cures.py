"""The study of cures: variants do what they say, and the table counts what became of trainings."""

import copy
from concurrent.futures import Future

import numpy as np
import pandas as pd
import pytest
import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F

from kronscope.optim import KBFGS, KBFGSLimited
from kronscope.optim.methods.kbfgs import bfgs
from kronscope.studies import problems
from kronscope.studies.experiments.kbfgs_stability import cures
from kronscope.studies.experiments.kbfgs_stability import variants as kbfgs_variants
from kronscope.studies.results import records
from kronscope.studies.training import trials, workers
from tests.pools import in_process


def autoencoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 8))


DATA = [torch.rand(20, 8, generator=torch.Generator().manual_seed(k)) for k in range(6)]


def closure_of(opt, model, x):
    def closure():
        opt.zero_grad()
        loss = F.mse_loss(model(x), x, reduction="sum") / len(x)
        loss.backward()
        return loss

    return closure


def flat(model):
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def train(kind, steps=4, **settings):
    model = autoencoder()
    opt = kind(model, **settings)
    points = [flat(model)]
    for x in DATA[:steps]:
        opt.step(closure_of(opt, model, x))
        points.append(flat(model))
    return model, opt, points


def test_undoing_goes_back_where_the_loss_rose():
    model, opt, _ = train(kbfgs_variants.Undoing, curvature_limit=1.0)
    saved = copy.deepcopy(model.state_dict())
    x, before = DATA[4], flat(model)
    for lr, moves in ((1e-3, True), (1e4, False)):
        model.load_state_dict(saved)
        opt.param_groups[0]["lr"] = lr
        H_g = opt.preconditioner()["0"].left.clone()
        opt.step(closure_of(opt, model, x))
        assert torch.equal(flat(model), before) != moves
        momentum = opt.state[model[0].weight]["momentum"]
        assert bool(momentum.any()) == moves
        assert not torch.equal(opt.preconditioner()["0"].left, H_g)  # the pair is kept


def test_a_planned_change_that_is_trusted():
    """After a shortened step what it planned, ⟨M, −d⟩, is the share of the loss times the cut."""
    settings = {"lr": 0.3, "momentum": 0.0}
    for share in (1e-4, 1e4):
        model = autoencoder()
        opt = kbfgs_variants.Trusting(model, **settings, curvature_limit=share)
        _, _, whole = train(KBFGS, 1, **settings)
        before = flat(model)
        closure = closure_of(opt, model, DATA[0])
        loss = closure()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        opt.step(closure)
        step, long = flat(model) - before, whole[1] - whole[0]
        cut = min(1.0, share * loss.item() / (-gradient @ long).item())
        torch.testing.assert_close(step, cut * long, rtol=1e-3, atol=1e-7)
        assert (cut < 1) == (share < 1)


def test_a_shortened_step_with_its_whole_momentum():
    settings = {"lr": 0.3, "curvature_limit": 1e-3}
    (_, ours, a), (_, other, b) = (
        train(kind, 1, **settings) for kind in (KBFGSLimited, kbfgs_variants.StepOnly)
    )
    assert torch.equal(a[1], b[1])
    M, m = (next(iter(state["momentum"] for state in opt.state.values())) for opt in (other, ours))
    torch.testing.assert_close(m / M, torch.full_like(m, (m / M).flatten()[0].item()))
    assert (m.norm() < 0.5 * M.norm()).item()


def test_the_ramp():
    _, ramped, points = train(kbfgs_variants.Ramped, 3, lr=0.3, momentum=0.0)
    _, _, whole = train(KBFGS, 1, lr=0.3, momentum=0.0)
    step = (whole[1] - whole[0]) / kbfgs_variants.RAMP
    torch.testing.assert_close(points[1] - points[0], step, rtol=1e-4, atol=1e-8)
    assert ramped.param_groups[0]["lr"] == pytest.approx(0.3 * 3 / kbfgs_variants.RAMP)


def test_the_scaled_start_makes_the_first_secant_scale_right():
    """γ y · y = s · y: what the first update of H_g starts from maps y to the length along s."""
    model = autoencoder()
    opt = kbfgs_variants.ScaledStart(model, lr=0.3)
    met = []
    inner = KBFGS._learn_h

    def watched(self, stack, first, second):
        met.append(stack["H_g"].clone())
        inner(self, stack, first, second)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KBFGS, "_learn_h", watched)
        opt.step(closure_of(opt, model, DATA[0]))
    for H_g, stack in zip(met, opt._harness.stacks, strict=True):
        s, y = stack["s"], stack["y"]  # the averages after one step: one scale for both
        eye = torch.eye(H_g.shape[-1])
        torch.testing.assert_close(H_g, (s * y).sum() / (y * y).sum() * eye[None])


def test_the_inverted_input_factor():
    model, opt, _ = train(kbfgs_variants.InvertedInput, 3, lr=0.3, damping=0.3)
    for name, map_ in opt.preconditioner().items():
        A = opt.state[model.get_submodule(name).weight]["A"].double()
        product = map_.right.double() @ (A + 0.3**0.5 * torch.eye(len(A)))
        torch.testing.assert_close(product, torch.eye(len(A)).double(), rtol=0, atol=1e-4)
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Flatten(), torch.nn.Linear(18, 2))
    opt = kbfgs_variants.InvertedInput(net, lr=0.1)
    x, t = torch.randn(4, 1, 5, 5), torch.tensor([0, 1, 1, 0])

    def closure():
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), t)
        loss.backward()
        return loss

    with pytest.raises(ValueError, match=r"layers \['0'\] no A is kept"):
        opt.step(closure)


def test_pairs_of_quarters_of_the_batch():
    """H_g and H_a after a step are BFGS by each quarter's pair, then by that of the whole batch."""
    settings = {"lr": 0.3, "damping": 0.3, "momentum": 0.0, "decay": 0.0}
    x = DATA[0].double()

    def inputs_and_gradients(model):
        h = [x]
        h += [model[0](x)]
        h += [model[1](h[1])]
        h += [model[2](h[2])]
        for hidden in h[1:]:
            hidden.retain_grad()
        (len(x) * F.mse_loss(h[3], x, reduction="sum") / len(x)).backward()
        return [(h[0], h[1], h[1].grad), (h[2], h[3], h[3].grad)]

    model = autoencoder().double()
    before = inputs_and_gradients(model)
    opt = kbfgs_variants.InParts(model, **settings)
    opt.step(closure_of(opt, model, x))
    after = inputs_and_gradients(model)
    quarters = [slice(5 * k, 5 * k + 5) for k in range(4)]
    for k, name in enumerate(opt.preconditioner()):
        (a, z, g), (_, z_new, g_new) = before[k], after[k]
        a = torch.cat([a, torch.ones(len(a), 1)], 1).detach()
        A = a.T @ a / len(a) + 0.3**0.5 * torch.eye(a.shape[1]).double()
        H_g, H_a = torch.eye(z.shape[1]).double()[None], torch.linalg.inv(A)[None]
        for part in [*quarters, slice(None)]:
            s, y = (z_new - z)[part].mean(0)[None], (g_new - g)[part].mean(0)[None]
            pair = bfgs.double_damping(s.detach(), y, H_g, 0.3**0.5)
            bfgs.bfgs_(H_g, pair.s, pair.y, torch.tensor([True]))
            s = H_a @ a[part].mean(0)
            bfgs.bfgs_(H_a, s, s @ A, torch.tensor([True]))
        map_ = opt.preconditioner()[name]
        torch.testing.assert_close(map_.left, H_g[0])
        torch.testing.assert_close(map_.right, H_a[0])
    with pytest.raises(ValueError, match="at least 4 examples; got 3"):
        opt.step(closure_of(opt, model, x[:3]))


@pytest.fixture(scope="module", autouse=True)
def _without_workers():
    with in_process():
        yield


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    with Progress(disable=True) as progress:
        return cures.run(cures.TINY, tmp_path_factory.mktemp("results"), progress)


def test_a_run(done):
    header, frame = records.read_header(done), records.read(done)
    assert set(frame["optimizer"]) == {"published", *cures.TINY.cures}
    assert header["question"].startswith("What keeps K-BFGS from diverging")
    assert [row[0] for row in header["comparison"]["rows"]] == ["published", *cures.TINY.cures]
    assert header["comparison"]["rows"][0][-1] == "1.00"
    assert len(list((done / "trials").iterdir())) == 8


def test_every_cure_can_be_built():
    problem = problems.get("digits-autoencoder-small")
    for name in cures.CANDIDATES:
        (trial,) = cures._trials(cures.Grid(problem.name, seeds=1), name)
        assert trial.optimizer in {"kbfgs", "kbfgs_limited", *kbfgs_variants.VARIANTS}
    third = dict(cures._trials(cures.Grid(problem.name, seeds=1), "lr a third")[0].settings)
    assert third["lr"] == pytest.approx(problem.optimizers["kbfgs"]["lr"] / 3)


def a_run(end, seconds=1.0, last_step=-1):
    rows = [
        {"step": k, "epoch": k, "seconds": k * seconds, "metric": "train_loss", "value": v}
        for k, v in enumerate((9.0, end))
    ]
    ended = "the loss is not finite" if last_step >= 0 else ""
    return pd.DataFrame(rows[: 1 if ended else 2]).assign(ended=ended, last_step=last_step)


def test_the_table():
    frames = {
        "published": [a_run(4.0), a_run(0.0, last_step=7), a_run(6.0), a_run(10.0)],
        "limit 10": [a_run(5.0, 1.1), a_run(2.0), a_run(0.0, last_step=9), a_run(3.0)],
    }
    published, limited = cures.table(frames, cures.Grid(seeds=4)).rows
    assert published[1].startswith("2 of 4 ")
    assert published[2:] == ["7 (7–7)", "5.00", "5.00", "1.00"]
    assert limited[1].startswith("1 of 4 ")
    assert limited[2:] == ["9 (9–9)", "3.00", "5.00", "1.10"]


class Recording:
    """A pool that does what it is given at once, and notes it."""

    def __init__(self):
        self.given = []

    def submit(self, _, trial):
        self.given.append((trial.optimizer, trial.seed, trial.epochs))
        future = Future()
        future.set_result(a_run(1.0).assign(epochs=trial.epochs))
        return future


def test_trials_come_in_order_the_longest_first(tmp_path, monkeypatch):
    pool = Recording()
    monkeypatch.setattr(workers, "shared_pool", lambda _: pool)
    wanted = [
        trials.Trial("p", name, (), seed, epochs)
        for seed, epochs in ((0, 1), (1, 1), (2, 3))
        for name in ("a", "b")
    ]
    assert len(list(trials.complete(tmp_path, wanted, 1))) == 6
    assert [(name, seed) for name, seed, _ in pool.given] == [
        (name, seed) for seed in (2, 0, 1) for name in ("a", "b")
    ]


def test_an_unknown_cure(tmp_path):
    grid = cures.Grid("digits-autoencoder-small", ("prayer",))
    with pytest.raises(ValueError, match=r"no cure \['prayer'\]; known: \['published', "):
        cures.run(grid, tmp_path, Progress(disable=True))
    assert not np.any([path.is_file() for path in tmp_path.rglob("*")])
