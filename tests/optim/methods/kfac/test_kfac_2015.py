"""KFAC2015: rescaling, momentum and adaptive damping against dense matrices in float64."""

import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kronscope.optim import KFAC, KFAC2015
from kronscope.optim.capture.likelihoods import FISHER, LIKELIHOODS
from kronscope.optim.core.levenberg_marquardt import (
    LevenbergMarquardt,
    adapted,
    best_trial,
    reduction_ratio,
)
from kronscope.optim.methods.kfac.rescaling import best_in_plane
from tests.optim.models import CASES

TAU, DAMPING = 1e-2, 0.3
STILL = LevenbergMarquardt(period=10**9, gamma_period=10**9)  # adapts nothing
QUICK = LevenbergMarquardt(period=2, omega=0.5, gamma_period=3, gamma_omega=0.25)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)  # optimizers seed their label generators by it


def make(case, **settings):
    usual = {"damping": DAMPING, "weight_decay": TAU, "refresh_every": 3, "adaptive": STILL}
    return KFAC2015(case.model, likelihood=case.likelihood, **{**usual, **settings})


def closure_of(opt, case, batch):
    def closure():
        opt.zero_grad()
        loss = case.loss(case.model, batch)
        loss.backward()
        return loss

    return closure


def train(opt, case, batches):
    return [opt.step(closure_of(opt, case, batch)).item() for batch in batches]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors]).clone()


def weights(model):
    return flat(model.parameters())


OUTPUT = {
    "categorical": lambda z: torch.diag(z.softmax(0)) - torch.outer(z.softmax(0), z.softmax(0)),
    "bernoulli": lambda z: torch.diag(z.sigmoid() * (1 - z.sigmoid())),
    "gaussian": lambda z: torch.eye(len(z)),
}


def dense_ggn(case, x):
    """(1/m) Σ_n J_nᵀ H_n J_n [d, d], one output of one example after the other."""
    parameters, total = list(case.model.parameters()), 0
    for n in range(len(x)):
        z = case.model(x[n : n + 1])[0]
        J = torch.stack([flat(torch.autograd.grad(o, parameters, retain_graph=True)) for o in z])
        total = total + J.T @ OUTPUT[case.likelihood](z.detach()) @ J
    return total / len(x)


def gradient(case, batch):
    """∇ of the mean loss plus its L2 term, [d]."""
    parameters = list(case.model.parameters())
    return flat(torch.autograd.grad(case.loss(case.model, batch), parameters)) + TAU * weights(
        case.model
    )


def apply(opt, model, vector):
    """-P vector by `preconditioner()`, [d] in the order of the parameters."""
    at, parts = 0, {}
    for name, p in model.named_parameters():
        parts[name] = vector[at : at + p.numel()].reshape(p.shape)
        at += p.numel()
    out = []
    for name, P in opt.preconditioner().items():
        W, b = parts[f"{name}.weight"].flatten(1), parts.get(f"{name}.bias")
        M = W if b is None else torch.cat([W, b[:, None]], 1)
        D = -(P @ M.reshape(-1)).reshape(M.shape)
        out.append(D if b is None else D[:, :-1])
        if b is not None:
            out.append(D[:, -1])
    return flat(out)


def held_steps(opt, model):
    """δ, the last step [d], from the state."""
    out = []
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            M = opt.state[module.weight]["momentum"].reshape(len(module.weight), -1)
            out.append(M if module.bias is None else M[:, :-1])
            if module.bias is not None:
                out.append(M[:, -1])
    return flat(out)


def model_value(v, g, C):
    return g @ v + 0.5 * v @ C @ v


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_alpha_and_mu_solve_the_dense_system(name, momentum):
    case = CASES[name]()
    opt = make(case, momentum=momentum, lr=0.7)
    train(opt, case, case.batches[:3])
    for batch in case.batches[3:6]:
        before, g, old = weights(case.model), gradient(case, batch), held_steps(opt, case.model)
        C = dense_ggn(case, batch[0]) + (DAMPING + TAU) * torch.eye(len(g))
        train(opt, case, [batch])
        delta = apply(opt, case.model, g)
        V = torch.stack([delta, old] if momentum else [delta], 1)
        c = -torch.linalg.solve(V.T @ C @ V, V.T @ g)
        found = torch.stack([opt.rescaling[k] for k in ("alpha", "mu")][: V.shape[1]])
        # products of a few hundred terms, then a 2 x 2 system with a condition below 1e4
        torch.testing.assert_close(found, c, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(weights(case.model) - before, 0.7 * V @ c, rtol=1e-9, atol=1e-12)
        if momentum:
            torch.testing.assert_close(held_steps(opt, case.model), V @ c, rtol=1e-9, atol=1e-12)
        else:
            assert opt.rescaling["mu"] == 0


def quadratic_case(m=12):
    """A linear model under half the squared error: its loss is quadratic, its Fisher exact."""
    Case = type(CASES["mlp"]())
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 3))
    x, t = torch.randn(m, 4), torch.randn(m, 3)

    def loss(net, batch):
        return 0.5 * (net(batch[0]) - batch[1]).square().sum() / len(batch[0])

    return Case(model, [(x, t)] * 40, loss, "gaussian")


def test_the_step_is_the_minimum_in_its_plane_on_a_quadratic():
    case = quadratic_case()
    opt = make(case, damping=1e-9)
    train(opt, case, case.batches[:2])
    g, old = gradient(case, case.batches[0]), held_steps(opt, case.model)
    train(opt, case, case.batches[:1])
    delta, after = apply(opt, case.model, g), gradient(case, case.batches[0])
    for v in (delta, old):
        # the gradient that is left is that of λ/2 ‖step‖², λ = 1e-9
        assert abs(after @ v) < 1e-7 * abs(g @ delta)


def test_exact_curvature_needs_one_step():
    case = quadratic_case()
    opt = make(case, damping=1e-12, weight_decay=0.0)
    x = torch.cat([case.batches[0][0], torch.ones(12, 1)], 1)
    best = torch.linalg.lstsq(x, case.batches[0][1]).solution.T
    train(opt, case, case.batches[:2])
    state, layer = opt.state[case.model[0].weight], case.model[0]
    state["A_inv"].copy_(torch.linalg.inv(x.T @ x / 12))
    state["G_inv"].copy_(7 * torch.eye(3))  # α takes the factor off again
    with opt.frozen():
        train(opt, case, case.batches[:1])
    found = torch.cat([layer.weight, layer.bias[:, None]], 1)
    # λ = 1e-12 and the rounding of a system with a condition below 100
    torch.testing.assert_close(found, best, rtol=0, atol=1e-10)
    torch.testing.assert_close(opt.rescaling["alpha"].item(), 1 / 7, rtol=1e-9, atol=0)


@pytest.mark.parametrize("lr", [1.0, 0.5])
def test_rho_is_one_on_a_quadratic_and_lambda_falls(lr):
    case = quadratic_case()
    opt = make(case, lr=lr, adaptive=LevenbergMarquardt(gamma_period=100))
    factors = []
    for batch in case.batches[:11]:
        train(opt, case, [batch])
        factors.append(opt.rescaling["lambda"].item())
    # two losses near 1 are subtracted: the decrease is known to 1e-16 over its size
    assert abs(opt.rescaling["rho"].item() - 1) < 1e-6
    omega = (19 / 20) ** 5
    assert factors == pytest.approx([1.0] * 5 + [omega] * 5 + [omega**2])


def test_lambda_rises_where_the_model_is_wrong():
    case = quadratic_case()
    steep = case._replace(loss=lambda net, batch: 10 * case.loss(net, batch))
    opt = make(steep, adaptive=QUICK)
    train(opt, steep, steep.batches[:3])  # steps ten times too long for the true curvature
    assert opt.rescaling["rho"] < 0
    assert opt.rescaling["lambda"] == 2.0


def test_rules():
    one = torch.tensor(1.0)
    for rho, factor in ((0.76, 0.5), (0.74, 1.0), (0.26, 1.0), (0.24, 2.0), (-torch.inf, 2.0)):
        assert adapted(one, torch.tensor(rho), 0.5) == factor
    assert adapted(one, torch.tensor(torch.nan), 0.5) == 1.0
    ratio = reduction_ratio
    assert ratio(torch.tensor(-1.0), torch.tensor(-4.0)) == 0.25
    assert ratio(torch.tensor(torch.nan), torch.tensor(-4.0)) == -torch.inf
    assert ratio(torch.tensor(0.0), torch.tensor(0.0)).isnan()
    assert best_trial(one, torch.tensor([0.0, -1.0, torch.nan]), 0.5) == 0.5
    assert best_trial(one, torch.tensor([0.0, 1.0, -1.0]), 0.5) == 2.0
    assert best_trial(one, torch.full((3,), torch.nan), 0.5) == 1.0


def test_rho_counts_the_weight_decay():
    case = CASES["mlp"]()
    opt = make(case, adaptive=LevenbergMarquardt(period=3), lr=0.8)
    train(opt, case, case.batches[:3])
    batch = case.batches[3]
    before, g, C = weights(case.model), gradient(case, batch), dense_ggn(case, batch[0])
    C = C + TAU * torch.eye(len(g))  # λ is not part of what is foreseen
    start = case.loss(case.model, batch) + TAU / 2 * before @ before
    train(opt, case, [batch])
    after = weights(case.model)
    end = case.loss(case.model, batch) + TAU / 2 * after @ after
    rho = (end - start) / model_value(after - before, g, C)
    # differences of losses near 4 by about 1e-2
    torch.testing.assert_close(opt.rescaling["rho"], rho.detach(), rtol=1e-9, atol=0)


def test_the_model_takes_the_adapted_damping():
    case = CASES["mlp"]()
    opt = make(case, adaptive=LevenbergMarquardt(period=2, omega=0.5))
    train(opt, case, case.batches[:3])
    factor = opt.rescaling["lambda"].item()
    assert factor != 1.0
    batch, old = case.batches[3], held_steps(opt, case.model)
    g, C = gradient(case, batch), dense_ggn(case, batch[0])
    C = C + (factor * DAMPING + TAU) * torch.eye(len(g))
    train(opt, case, [batch])
    V = torch.stack([apply(opt, case.model, g), old], 1)
    c = -torch.linalg.solve(V.T @ C @ V, V.T @ g)
    torch.testing.assert_close(opt.rescaling["alpha"], c[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(opt.rescaling["mu"], c[1], rtol=1e-9, atol=0)


def test_gamma_is_the_best_of_three():
    seen, line_would_differ = set(), False
    for damping, start in ((1e-3, 1.0), (1e-3, 30.0), (0.3, 30.0)):
        case = CASES["mlp"]()
        rules = LevenbergMarquardt(period=100, gamma_period=3, gamma_omega=0.8)
        opt = make(case, adaptive=rules, damping=damping, update_every=3)
        train(opt, case, case.batches[:3])
        batch, old = case.batches[3], held_steps(opt, case.model)
        g, C = gradient(case, batch), dense_ggn(case, batch[0])
        C = C + (damping + TAU) * torch.eye(len(g))
        opt.rescaling["gamma"].fill_(start)
        train(opt, case, [batch])
        values, on_line = {}, {}
        for factor in (1.0, 0.8, 1 / 0.8):
            delta = candidate(opt, case.model, g, start * factor * (damping + TAU) ** 0.5)
            V = torch.stack([delta, old], 1)
            values[factor] = model_value(-V @ torch.linalg.solve(V.T @ C @ V, V.T @ g), g, C)
            on_line[factor] = -0.5 * (g @ delta) ** 2 / (delta @ C @ delta)
        line_would_differ |= min(on_line, key=on_line.get) != min(values, key=values.get)
        best = min(values, key=values.get)
        assert opt.rescaling["gamma"] == start * best
        seen.add(best)
        # the inverses of this step are those of the new γ
        gamma = opt.rescaling["gamma"].item() * (damping + TAU) ** 0.5
        torch.testing.assert_close(apply(opt, case.model, g), candidate(opt, case.model, g, gamma))
    assert len(seen) > 1
    assert line_would_differ


def candidate(opt, model, g, gamma):
    """Δ by new inverses of the factors in the state."""
    at, out = 0, []
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        o, i = module.weight.shape
        W, b = g[at : at + o * i].reshape(o, i), g[at + o * i : at + o * i + o]
        at += o * i + o
        A, G = opt.state[module.weight]["A"], opt.state[module.weight]["G"]
        ratio = ((A.trace() / (i + 1)) / (G.trace() / o)).sqrt()
        left = torch.linalg.inv(G + gamma / ratio * torch.eye(o))
        right = torch.linalg.inv(A + gamma * ratio * torch.eye(i + 1))
        D = -left @ torch.cat([W, b[:, None]], 1) @ right
        out += [D[:, :-1], D[:, -1]]
    return flat(out)


@pytest.mark.parametrize("phase", range(7))
def test_resume_is_bit_exact(phase):
    case = CASES["cnn"]()
    start = {k: v.clone() for k, v in case.model.state_dict().items()}
    opt = make(case, adaptive=QUICK)
    case.model.load_state_dict(start)
    train(opt, case, case.batches[:phase])
    buffer = io.BytesIO()
    torch.save({"model": case.model.state_dict(), "opt": opt.state_dict()}, buffer)
    expected = train(opt, case, case.batches[phase:9])
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    twin = CASES["cnn"]()
    twin.model.load_state_dict(saved["model"])
    resumed = KFAC2015(twin.model)  # all settings come with the state
    resumed.load_state_dict(saved["opt"])
    assert train(resumed, twin, twin.batches[phase:9]) == expected
    assert torch.equal(weights(case.model), weights(twin.model))
    for name, value in opt.rescaling.items():
        assert torch.equal(value, resumed.rescaling[name])
    assert opt.rescaling["lambda"] != 1.0


def test_frozen_steps_adapt_nothing_and_are_honest():
    case = CASES["cnn"]()
    rules = LevenbergMarquardt(period=1, omega=0.5, gamma_period=1, gamma_omega=0.5)
    opt = make(case, adaptive=rules, momentum=0.0, lr=0.5, damping=30.0)
    train(opt, case, case.batches[:4])
    names = ("lambda", "gamma", "rho")
    held = [opt.rescaling[name].item() for name in names]
    before, g = weights(case.model), gradient(case, case.batches[4])
    with opt.frozen():
        train(opt, case, [case.batches[4]])
        expected = 0.5 * opt.rescaling["alpha"] * apply(opt, case.model, g)
        torch.testing.assert_close(weights(case.model) - before, expected, rtol=1e-9, atol=1e-13)
        train(opt, case, case.batches[5:8])
    assert held == [opt.rescaling[name].item() for name in names]
    train(opt, case, case.batches[8:])
    assert all(opt.rescaling[k] != old for k, old in zip(names, held, strict=True))


@pytest.mark.parametrize("name", ["cnn", "shared"])
def test_pieces_of_a_batch_give_the_same_step(name):
    pair = []
    for sizes in ([8], [3, 1, 4]):
        case = CASES[name]()
        opt = make(case)
        train(opt, case, case.batches[:3])

        def closure(opt=opt, case=case, sizes=sizes):
            opt.zero_grad()
            x, t = case.batches[3]
            for part in zip(x.split(sizes), t.split(sizes), strict=True):
                (case.loss(case.model, part) * len(part[0]) / 8).backward()
            if len(sizes) > 1:
                case.model(case.batches[9][0])  # without a backward it counts for nothing
            return case.loss(case.model, (x, t)).detach()

        with opt.frozen():  # other pieces, other labels
            opt.step(closure)
        pair.append((weights(case.model), opt.rescaling["alpha"], opt.rescaling["mu"]))
    torch.testing.assert_close(*pair, rtol=1e-10, atol=1e-12)  # sums in another order


class Mixed(nn.Module):
    """Parameters with and without a block, dropout, running statistics, an in-place ReLU."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(0.3)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.dropout(self.relu(self.norm(self.first(x))))).mul_(1.5)


def in_place_loss(net, batch):
    return F.cross_entropy(net(batch[0]).sub_(1.0), batch[1])


def mixed_case():
    torch.manual_seed(5)
    model, Case = Mixed(), type(CASES["mlp"]())
    data = list(zip(torch.randn(8, 16, 4), torch.randint(3, (8, 16)), strict=True))
    return Case(model, data, in_place_loss, "categorical")


def test_the_closure_leaves_the_trace_of_one_call():
    case, twin = mixed_case(), mixed_case()
    opt = make(case, weight_decay=0.0, adaptive=QUICK)
    for batch in case.batches[:7]:
        twin.model.load_state_dict(case.model.state_dict())
        torch.manual_seed(11)
        twin.model.zero_grad()
        loss = twin.loss(twin.model, batch)
        loss.backward()
        state = torch.get_rng_state()
        torch.manual_seed(11)
        assert opt.step(closure_of(opt, case, batch)).item() == loss.item()
        assert torch.equal(torch.get_rng_state(), state)
        for own, other in zip(case.model.parameters(), twin.model.parameters(), strict=True):
            assert torch.equal(own.grad, other.grad)
            assert own.requires_grad
        for own, other in zip(case.model.buffers(), twin.model.buffers(), strict=True):
            assert torch.equal(own, other)


def test_parameters_outside_layers_take_part():
    case = mixed_case()
    case.model.dropout.p = 0.0
    opt = make(case, weight_decay=0.0)
    losses = []
    for batch in case.batches[:1] * 8:
        gamma, before = case.model.norm.weight, case.model.norm.weight.detach().clone()
        held = opt.state[gamma].get("momentum", torch.zeros(6)).clone()
        losses += train(opt, case, [batch])
        alpha, mu = opt.rescaling["alpha"], opt.rescaling["mu"]
        expected = -alpha / DAMPING * gamma.grad + mu * held
        torch.testing.assert_close(gamma.detach() - before, expected)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["input", "gradient"])
def test_not_finite_leaves_a_finite_state(bad, where):
    case = CASES["mlp"]()
    opt = make(case, adaptive=QUICK)
    train(opt, case, case.batches[:4])
    before, held = weights(case.model), held_steps(opt, case.model)
    inner, weight = closure_of(opt, case, case.batches[4]), case.model[2].weight
    last = opt.state[weight]["momentum"].clone()

    def closure():
        loss = inner()
        if where == "gradient" and weight.grad is not None:
            weight.grad[0, 0] = bad
        return loss

    if where == "input":
        x = case.batches[4][0].clone()
        x[0, 0] = bad
        closure = closure_of(opt, case, (x, case.batches[4][1]))
    opt.step(closure)
    moved = weights(case.model) != before
    if where == "input":
        assert not moved.any()
        assert opt.rescaling["alpha"] == opt.rescaling["mu"] == 0
        assert torch.equal(held, held_steps(opt, case.model))
    else:
        names = [n for n, p in case.model.named_parameters() for _ in range(p.numel())]
        assert {n.split(".")[0] for n, m in zip(names, moved.tolist(), strict=True) if m} == {
            "0",
            "4",
        }
    assert opt.state[weight]["counts"][3] >= 1
    assert torch.equal(opt.state[weight]["momentum"], last)
    train(opt, case, case.batches[5:])
    assert weights(case.model).isfinite().all()
    for state in opt.state.values():
        assert all(value.isfinite().all() for value in state.values())
    assert all(opt.rescaling[k].isfinite() for k in ("lambda", "gamma", "alpha", "mu"))


def test_it_needs_no_learning_rate():
    """From far too much and far too little damping the loss falls as from a good start."""
    ends = []
    for damping in (1e-4, 0.1, 100.0):
        case = CASES["mlp"]()
        rules = LevenbergMarquardt(omega=0.5, gamma_omega=0.25, gamma_period=5)
        opt = make(case, damping=damping, weight_decay=0.0, adaptive=rules)
        ends.append(train(opt, case, case.batches[:1] * 30)[-1])
    fixed = CASES["mlp"]()
    plain = KFAC(fixed.model, damping=100.0, likelihood="bernoulli")
    reference = train(plain, fixed, fixed.batches[:1] * 30)[-1]
    assert max(ends) < reference


@pytest.mark.parametrize("how", ["model", "inside", "outside"])
def test_bfloat16(how):
    case = CASES["mlp"]()
    dtype = torch.bfloat16 if how == "model" else torch.float32
    case = case._replace(model=case.model.to(dtype))
    opt = make(case, adaptive=QUICK)
    batches = [(x.to(dtype), t.to(dtype)) for x, t in case.batches]

    def closure(batch, *, enabled):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            opt.zero_grad()
            loss = case.loss(case.model, batch)
        loss.backward()
        return loss

    losses = []
    for batch in batches[:1] * 8:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "outside"):
            losses.append(opt.step(lambda b=batch: closure(b, enabled=how != "model")).item())
    assert losses[-1] < losses[0] - 0.05
    momentum = opt.state[case.model[0].weight]["momentum"]
    assert momentum.dtype == torch.float32
    assert case.model[0].weight.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_waits_for_the_device():
    case = CASES["cnn"]()
    case = case._replace(model=case.model.cuda())
    batches = [(x.cuda(), t.cuda()) for x, t in case.batches]
    opt = make(case, adaptive=QUICK)
    for batch in batches[:4]:
        opt.step(closure_of(opt, case, batch))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[4:]:  # with a search for γ, a ratio and a refresh among them
            opt.step(closure_of(opt, case, batch))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weights(case.model).isfinite().all()


def test_best_in_plane():
    torch.manual_seed(0)
    V, g = torch.randn(5, 2), torch.randn(5)
    slope, Q = V.T @ g, V.T @ V
    found = best_in_plane(slope, Q, Q.dtype)
    torch.testing.assert_close(found, -torch.linalg.solve(Q, slope))
    for size in range(5, 50):
        v, g = torch.randn(size), torch.randn(size)
        V = torch.stack([v, -3.1 * v], 1)  # a line, up to rounding
        found = best_in_plane(V.T @ g, V.T @ V, Q.dtype)
        torch.testing.assert_close(V @ found, -v * (v @ g) / (v @ v))
        torch.testing.assert_close(found[1], -found[0] / 3.1)  # half of it each
    assert best_in_plane(torch.zeros(2), torch.zeros(2, 2), Q.dtype).tolist() == [0, 0]


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_fisher_at_the_output(name):
    torch.manual_seed(0)
    z, u = torch.randn(4, 3), torch.randn(4, 3)
    expected = torch.stack([OUTPUT[name](a) @ b for a, b in zip(z, u, strict=True)])
    torch.testing.assert_close(FISHER[name](z, u), expected)
    places = torch.stack([z, z.flip(0)], 2), torch.stack([u, u.flip(0)], 2)
    torch.testing.assert_close(FISHER[name](*places)[..., 1], expected.flip(0))
    assert set(FISHER) == set(LIKELIHOODS)


def test_mistakes():
    case = CASES["mlp"]()
    for name in ("adaptive", "rescale", "pi", "growing_decay"):
        with pytest.raises(TypeError, match=f"KFAC takes no {name}=; use KFAC2015"):
            KFAC(case.model, **{name: True})
    with pytest.raises(ValueError, match=r"one of \['categorical'.*got likelihood='empirical'"):
        KFAC2015(case.model, likelihood="empirical")
    with pytest.raises(ValueError, match="omega must lie in"):
        LevenbergMarquardt(omega=1.5)
    with pytest.raises(ValueError, match="gamma_period must be an integer of at least 1, got 0"):
        LevenbergMarquardt(gamma_period=0)
    with pytest.raises(TypeError, match=r"KFAC2015 evaluates .* needs a closure"):
        make(case).step()
    opt = make(case)
    opt.param_groups[0]["decoupled_weight_decay"] = True
    with pytest.raises(ValueError, match="decoupled_weight_decay=True does not go with it"):
        train(opt, case, case.batches[:1])
    opt = make(case, groups=[{"params": case.model[0].parameters(), "lr": 0.1}])
    with pytest.raises(ValueError, match=r"lr must be the same in all groups, got \[1.0, 0.1\]"):
        train(opt, case, case.batches[:1])
    opt, data = make(case), iter(case.batches)
    with pytest.raises(ValueError, match="draw it outside the closure"):
        opt.step(lambda: closure_of(opt, case, next(data))())
    opt = make(case)
    opt.found_inf = torch.zeros(())
    with pytest.raises(ValueError, match="GradScaler"):
        train(opt, case, case.batches[:1])


@pytest.mark.parametrize("name", sorted(CASES))
@pytest.mark.parametrize("warm", [0, 3])
def test_factors_are_plain_means_at_first(name, warm):
    """The k-th update decays by min(1 - 1/k, decay); batches of warm_up count among them."""
    case, twin = CASES[name](), CASES[name]()
    opt = make(case, lr=0.0, decay=0.6)
    single = KFAC(twin.model, lr=0.0, decay=0.0, likelihood=case.likelihood)  # one batch each
    if warm:
        opt.warm_up([lambda batch=batch: case.model(batch[0]) for batch in case.batches[:warm]])
    held = {}
    for k, batch in enumerate(case.batches[:7], 1):
        train(single, twin, [batch])  # with the labels that opt draws
        if k > warm:
            train(opt, case, [batch])
        keep = 1 - 1 / k if k <= warm else min(1 - 1 / k, 0.6)
        for p, q in zip(case.model.parameters(), twin.model.parameters(), strict=True):
            for factor in {"A", "G"} & single.state[q].keys():
                new = single.state[q][factor]
                old = held.get((p, factor), torch.zeros_like(new))
                held[p, factor] = keep * old + (1 - keep) * new
                if k >= warm:
                    torch.testing.assert_close(opt.state[p][factor], held[p, factor])
    assert len(held) >= 6


def test_groups_have_their_own_damping_and_decay():
    case = CASES["mlp"]()
    own = {"params": case.model[2].parameters(), "damping": 5.0, "weight_decay": 0.5}
    opt = make(case, groups=[own])
    train(opt, case, case.batches[:3])
    batch = case.batches[3]
    shift = flat(
        torch.full_like(p, 5.5 if i in (2, 3) else DAMPING + TAU)
        for i, p in enumerate(case.model.parameters())
    )
    tau = flat(
        torch.full_like(p, 0.5 if i in (2, 3) else TAU)
        for i, p in enumerate(case.model.parameters())
    )
    g = gradient(case, batch) + (tau - TAU) * weights(case.model)
    C, old = dense_ggn(case, batch[0]) + torch.diag(shift), held_steps(opt, case.model)
    train(opt, case, [batch])
    V = torch.stack([apply_in_order(opt, case.model, g), old], 1)
    c = -torch.linalg.solve(V.T @ C @ V, V.T @ g)
    torch.testing.assert_close(opt.rescaling["alpha"], c[0], rtol=1e-9, atol=0)
    torch.testing.assert_close(opt.rescaling["mu"], c[1], rtol=1e-9, atol=0)


def apply_in_order(opt, model, g):
    """As `apply`; preconditioner() lists layers by group."""
    maps = opt.preconditioner()
    opt.preconditioner = lambda: dict(sorted(maps.items()))
    out = apply(opt, model, g)
    del opt.preconditioner
    return out
