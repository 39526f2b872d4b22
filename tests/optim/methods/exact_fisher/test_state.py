"""What ExactFisher holds: formulas on rows, failures that leave it as it was, resume."""

import pytest
import torch

from kronscope.optim.core import momentum
from kronscope.optim.core import refresher as refresh
from kronscope.optim.linalg import basics as linalg
from kronscope.optim.linalg import sample_space
from kronscope.optim.linalg.sample_space import add_combination_, compressed, gram, projected
from kronscope.optim.methods.exact_fisher import rows as exact_fisher_rows
from kronscope.optim.methods.exact_fisher.exact_fisher import ExactFisher
from tests.optim.models import cnn, mlp

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


@pytest.mark.parametrize("piece", [2**24, 40])
@pytest.mark.parametrize(("T", "out", "size"), [(1, 3, 4), (2, 30, 20), (3, 3, 4), (9, 4, 3)])
def test_formulas_by_dense_examples(monkeypatch, piece, T, out, size):
    monkeypatch.setattr(sample_space, "PIECE", piece)
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(2, 5, T, n, generator=generator) for n in (out, size))
    M, weights = torch.randn(2, out, size, generator=generator), torch.arange(10.0).reshape(2, 5)
    V = torch.einsum("smto,smti->smoi", g, x)
    for rows in ((g, x), compressed(g, x)):
        torch.testing.assert_close(gram(*rows), torch.einsum("smoi,snoi->smn", V, V))
        torch.testing.assert_close(projected(*rows, M), torch.einsum("smoi,soi->sm", V, M))
        expected = M + torch.einsum("sm,smoi->soi", weights, V)
        torch.testing.assert_close(add_combination_(M.clone(), *rows, weights), expected)
    assert compressed(g, x)[0].shape[2] == min(T, out, size)


def spoiled(batch):
    x, t = batch
    x = x.clone()
    x[0, 0] = float("nan")
    return x, t


def test_what_is_not_finite_changes_nothing():
    case = cnn()
    opt = ExactFisher(case.model, **SETTINGS, likelihood="empirical")
    train(opt, case, case.batches[:2])
    layer = case.model[0]
    before = {k: v.clone() for k, v in opt.state[layer.weight].items()}
    held = dense(opt.preconditioner()["0"])
    train(opt, case, [spoiled(case.batches[2])])
    after = opt.state[layer.weight]
    for name in ("g", "x", "L", "momentum", "damping"):
        assert torch.equal(after[name], before[name])
    assert torch.equal(dense(opt.preconditioner()["0"]), held)
    assert after["counts"].tolist() == [2, 0, 2]  # the rows and the gradient
    for state in opt.state.values():
        assert all(torch.isfinite(v).all() for v in state.values())
    W = weights(case.model)
    train(opt, case, case.batches[3:4])
    assert after["counts"].tolist() == [3, 0, 2]
    assert not torch.equal(weights(case.model), W)


def test_a_first_batch_that_is_not_finite_leaves_no_curvature():
    case = cnn()
    opt = ExactFisher(case.model, **SETTINGS, likelihood="empirical")
    W = weights(case.model)
    train(opt, case, [spoiled(case.batches[0])])
    assert torch.equal(weights(case.model), W)
    P = dense(opt.preconditioner()["0"])
    torch.testing.assert_close(P, torch.eye(len(P)) / SETTINGS["damping"])
    train(opt, case, case.batches[1:3])
    assert torch.isfinite(weights(case.model)).all()
    assert dense(opt.curvature()["0"]).norm() > 0


def failing(K, damping):
    L, ok = linalg.damped_inverse(K, damping)
    return L, torch.zeros_like(ok)


def test_failures_keep_the_last_good_rows_then_stop(monkeypatch):
    case = mlp()
    opt = ExactFisher(case.model, **SETTINGS)
    train(opt, case, case.batches[:1])
    held = {name: dense(P) for name, P in opt.preconditioner().items()}
    monkeypatch.setattr(exact_fisher_rows, "damped_cholesky", failing)
    x, t = case.batches[1]
    bigger = torch.cat([x, x]), torch.cat([t, t])  # room is made, and not taken
    train(opt, case, [bigger, case.batches[2]])
    for name, P in opt.preconditioner().items():
        torch.testing.assert_close(dense(P), held[name])
    assert opt.state[case.model[0].weight]["counts"].tolist() == [3, 2, 0]
    with pytest.raises(RuntimeError, match=r"layer '0': K .*3 times in a row; raise the damping"):
        train(opt, case, case.batches[3:4])


def test_a_failure_with_nothing_to_fall_back_on_stops_at_once(monkeypatch):
    case = mlp()
    monkeypatch.setattr(exact_fisher_rows, "damped_cholesky", failing)
    opt = ExactFisher(case.model, **SETTINGS)
    with pytest.raises(RuntimeError, match="layer '0': K could not be inverted, 1 times"):
        train(opt, case, case.batches[:1])


class Slow:
    """An event of a device that is three looks behind, unless it is waited for."""

    def __init__(self):
        self.looks = 0

    def query(self):
        self.looks += 1
        return self.looks > 3

    def synchronize(self):
        self.looks = 3


def test_verdicts_that_come_late(monkeypatch):
    """As on a GPU: a failure is noticed steps later, also when a larger batch has come since."""
    case = mlp(m=9)
    solver, broken = exact_fisher_rows.damped_cholesky, []

    def sometimes(K, damping):
        L, ok = solver(K, damping)
        return L, ok & (not broken)

    late = refresh._Verdict
    monkeypatch.setattr(refresh, "_on_its_way", lambda *args: late(*args, event=Slow()))
    monkeypatch.setattr(exact_fisher_rows, "damped_cholesky", sometimes)
    opt = ExactFisher(case.model, **SETTINGS)
    for k, m in enumerate((4, 4, 4, 4, 4, 9, 9, 9, 9, 9)):
        broken[:] = [k] if k in (1, 4) else []
        train(opt, case, [tuple(tensor[:m] for tensor in case.batches[k])])
    for name, F in opt.curvature().items():
        P = dense(opt.preconditioner()[name])
        eye = torch.eye(len(P))
        torch.testing.assert_close(P @ (dense(F) + SETTINGS["damping"] * eye), eye)
    # the second try finds nothing wrong, as it is made when the solver works again
    assert opt.state[case.model[0].weight]["counts"].tolist() == [10, 0, 0]


def test_masks_change_nothing(monkeypatch):
    fast, slow = cnn(), cnn()
    train(ExactFisher(fast.model, **SETTINGS, likelihood="categorical"), fast, fast.batches)
    for module in (exact_fisher_rows, linalg, momentum, refresh):
        monkeypatch.setattr(module, "known_true", lambda _: False)
    train(ExactFisher(slow.model, **SETTINGS, likelihood="categorical"), slow, slow.batches)
    # the same sums, but fused differently
    torch.testing.assert_close(weights(fast.model), weights(slow.model), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("at", [1, 2, 3, 4])
@pytest.mark.parametrize("stepped", [False, True], ids=["fresh", "stepped"])
def test_resume_is_exact(tmp_path, at, stepped):
    """At an update and between two, with batches that grow and shrink."""

    def make():
        case = cnn()
        sizes = (3, 8, 8, 5, 2, 8, 7)
        parts = [
            tuple(tensor[:m] for tensor in b) for b, m in zip(case.batches, sizes, strict=False)
        ]
        settings = {**SETTINGS, "likelihood": "categorical", "update_every": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return case._replace(batches=parts), ExactFisher(case.model, **settings)

    whole, opt = make()
    train(opt, whole, whole.batches)
    half, opt = make()
    train(opt, half, half.batches[:at])
    torch.save((half.model.state_dict(), opt.state_dict()), tmp_path / "saved.pt")
    parameters, state = torch.load(tmp_path / "saved.pt", weights_only=True)
    resumed, opt = make()
    if stepped:
        train(opt, resumed, resumed.batches[1:4])
    resumed.model.load_state_dict(parameters)
    opt.load_state_dict(state)
    train(opt, resumed, resumed.batches[at:])
    assert torch.equal(weights(whole.model), weights(resumed.model))
