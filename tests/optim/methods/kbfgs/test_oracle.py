"""The oracle of K-BFGS: by hand, by its equations and by the authors' trajectory."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.optim.models import CASES, cnn, mlp
from tests.optim.oracles_base import inverse
from tests.optim.oracles_bfgs import KBFGS, acceptable, powell, second_damping
from tests.paths import REFERENCE

RUN = json.loads((REFERENCE / "kbfgs_tiny.json").read_text())

every_case = pytest.mark.parametrize("case", sorted(CASES))


@every_case
def test_secant_equations(case):
    model, batches, loss, _ = CASES[case]()
    oracle = KBFGS(model, loss, lr=0.3, damping=0.3)
    limited = KBFGS(model, loss, lr=0.3, damping=0.3, history=4)
    for k, batch in enumerate(batches):
        oracle.step(batch)
        limited.step(batch)
        if k == 3:  # four pairs at most: nothing forgotten yet
            for name, P in oracle.next_P.items():
                torch.testing.assert_close(limited.next_P[name], P)
    for key, own in oracle.state.items():
        assert own["counts"]["H_a"] == len(batches)
        assert own["counts"]["H_g"] >= len(batches) - 2
        assert len(limited.state[key]["pairs"]) >= len(batches) - 2
        for H, (s, y) in ((own["H_g"], own["pairs"][-1]), (own["H_a"], own["action"])):
            torch.testing.assert_close(H @ y, s)
            assert torch.linalg.eigvalsh((H + H.mT) / 2).min() > 0
        s, y = limited.state[key]["pairs"][-1]
        torch.testing.assert_close(limited.state[key]["H_g"] @ y, s)


def test_damping_and_skip_rule_by_hand():
    s, y, H = torch.tensor([1.0, 0.0]), torch.tensor([0.1, 2.0]), torch.eye(2)
    fired, yes = powell(s, y, H)
    assert yes  # s·y = 0.1 is raised to a fifth of yᵀHy = 4.01
    torch.testing.assert_close(fired @ y, torch.tensor(0.2 * 4.01))
    assert torch.linalg.matrix_rank(torch.stack([fired - s, H @ y - s])) == 1
    assert not powell(y, y, H)[1]
    raised, yes = second_damping(s, y, 0.5)
    assert yes
    torch.testing.assert_close(s @ raised, torch.tensor(0.5))
    assert torch.linalg.matrix_rank(torch.stack([raised - y, s - y])) == 1
    assert not second_damping(s, 2 * s, 0.5)[1]
    with pytest.raises(ValueError, match=r"no guard for damping >= 1, got mu_2 = 1\.5"):
        second_damping(s, y, 1.5)
    gradient = torch.tensor([0.0, 600.0])  # of norm 600: 1e-4 ‖s‖² ‖g‖ = 0.06
    assert acceptable(s, y, gradient)
    assert not acceptable(s, y, 2 * gradient)
    assert not acceptable(s, -y, 0 * gradient)


def test_pairs_of_a_convolution():
    """Two steps on the first layer (9 positions, F.unfold) written out once more."""
    model, batches, loss, _ = cnn()
    oracle = KBFGS(model, loss, lr=0.3, damping=0.09)
    own, conv = oracle.state["0", 0], oracle.model[0]
    lambda_a = mu_2 = 0.3
    thresholds, update = [], oracle.update_h_g

    def recorded(key, own, mu_2, gradient):
        thresholds.append((key, gradient))
        update(key, own, mu_2, gradient)

    oracle.update_h_g = recorded
    s, y, H_g = torch.zeros(4), torch.zeros(4), torch.eye(4)
    for k, (x, t) in enumerate(batches[:2]):
        z = conv(x).detach()
        rows = F.unfold(x, 3, padding=1, stride=2).mT.reshape(-1, 18)
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        A = rows.mT @ rows / len(x)  # 9 positions summed, examples averaged
        g = output_gradient(oracle.model, loss, (x, t))
        first = torch.linalg.inv(0.1 * A + lambda_a * torch.eye(19))
        H_a = first if k == 0 else own["H_a"]
        oracle.step((x, t))
        torch.testing.assert_close(oracle.P["0"], torch.kron(H_g, H_a.contiguous()))
        ((_, gradient),) = [entry for entry in thresholds[-5:] if entry[0] == ("0", 0)]
        torch.testing.assert_close(gradient, g.mean((0, 2, 3)))  # the old point's
        s_a = H_a @ rows.mean(0)
        torch.testing.assert_close(own["action"][0], s_a)
        torch.testing.assert_close(own["action"][1], A @ s_a + lambda_a * s_a)
        g_new = output_gradient(oracle.model, loss, (x, t))
        s = 0.9 * s + 0.1 * (conv(x).detach() - z).mean((0, 2, 3))
        y = 0.9 * y + 0.1 * (g_new - g).mean((0, 2, 3))
        damped = powell(s, y, H_g)[0]
        torch.testing.assert_close(own["pairs"][k][0], damped)
        torch.testing.assert_close(own["pairs"][k][1], y + mu_2 * damped)
        H_g = own["H_g"]


def output_gradient(model, loss, batch):
    """m times the gradient of the mean loss at the first layer's output."""
    kept = []
    handle = model[0].register_forward_hook(lambda _, __, z: kept.append(z))
    value = loss(model, batch)
    handle.remove()
    return len(batch[0]) * torch.autograd.grad(value, kept)[0]


def test_history_is_the_recursion_on_the_last_pairs():
    model, batches, loss, _ = mlp()
    oracle = KBFGS(model, loss, lr=0.3, damping=0.3, history=3)
    for batch in batches:
        oracle.step(batch)
    for own in oracle.state.values():
        H = torch.eye(len(own["s"]))
        for s, y in own["pairs"][-3:]:
            Hy, rho = H @ y, 1 / (s @ y)
            H = H + (rho**2 * (y @ Hy) + rho) * torch.outer(s, s)
            H = H - rho * (torch.outer(s, Hy) + torch.outer(Hy, s))
        torch.testing.assert_close(own["H_g"], H)


def test_h_a_converges_to_the_damped_inverse():
    """With A frozen and x̄ varying, H_a -> (A + λ_A I)⁻¹."""
    torch.manual_seed(0)
    oracle = KBFGS(nn.Linear(3, 2), None, lr=0.1, damping=0.09)
    A = torch.cov(torch.randn(4, 30))
    own = {"A": A, "counts": {"H_a": 0}, "H_a": torch.eye(4)}
    for _ in range(300):
        oracle.update_h_a(("", 0), own, torch.randn(1, 1, 4), 0.3)
    # each update is exact along one random direction; the error shrinks geometrically
    torch.testing.assert_close(own["H_a"], inverse(A, 0.3), rtol=1e-6, atol=1e-6)


def test_kbfgs_follows_the_published_trajectory():
    layers = []
    for activation, (W, b) in zip(RUN["activations"], RUN["init"], strict=True):
        linear = nn.Linear(len(W[0]), len(W))
        linear.load_state_dict({"weight": torch.tensor(W), "bias": torch.tensor(b)})
        layers += [linear, nn.ReLU()] if activation == "relu" else [linear]
    X, size = torch.tensor(RUN["X"]), RUN["batch"]
    batches = [(x, x) for x in X.split(size)]

    def loss(model, batch):
        x, t = batch  # float32 targets, as in the recorded run
        return F.binary_cross_entropy_with_logits(model(x), t.float(), reduction="sum") / len(x)

    settings = {name: RUN[name] for name in ("lr", "damping", "weight_decay")}
    oracle = KBFGS(nn.Sequential(*layers), loss, **settings)
    oracle.warm_up(batches)
    for k, entry in enumerate(RUN["trajectory"]):
        oracle.step(batches[k % len(batches)])
        for unit, (W, b) in zip(oracle.units.values(), entry["weights"], strict=True):
            expected = torch.cat([torch.tensor(W), torch.tensor(b)[:, None]], 1)
            # 24 steps of rounding, in another order of sums than the recorded run
            assert (unit.matrix() - expected).norm() <= 1e-11 * expected.norm()
