"""Acceptance tests of the methods that stand between several files: identities and a toy run.

Others live with their method: dampings, secant equation, compact form and Hessian action in
test_bfgs.py; TKFAC, EKFAC, MBF, Shampoo, TNT, Eva and the exact Fisher in their own files; the
initial loss of the MNIST autoencoder in tests/studies.
"""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diag import Problem, exact
from diag.operators.forms import dense
from optim import KBFGS, KFAC
from optim.operators import Kronecker


def test_vec_is_row_major():
    """(P ⊗ Q) vec X = vec(P X Qᵀ)."""
    P, X, Q = torch.randn(3, 3), torch.randn(3, 4), torch.randn(4, 4)
    torch.testing.assert_close(Kronecker(P, Q) @ X.reshape(-1), (P @ X @ Q.T).reshape(-1))


def test_hessian_block_of_one_example_is_a_kronecker_product():
    """The exact block against central differences of the gradient, and ∂²ℓ/∂z² ⊗ x̃ x̃ᵀ."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3, bias=False))
    x, t = torch.randn(1, 3), torch.tensor([2])
    problem = Problem(model, F.cross_entropy, x, t)
    H = dense(exact.hessian(problem, problem.block("0")))

    def gradient(w_bar):
        with torch.no_grad():
            model[0].weight.copy_(w_bar[:, :3])
            model[0].bias.copy_(w_bar[:, 3])
        model.zero_grad()
        F.cross_entropy(model(x), t).backward()
        return torch.cat([model[0].weight.grad, model[0].bias.grad[:, None]], 1).reshape(-1)

    W = torch.cat([model[0].weight.detach(), model[0].bias.detach()[:, None]], 1)
    step, columns = 1e-5, []
    for i in range(8):
        e = torch.zeros(8)
        e[i] = step
        e = e.reshape(2, 4)
        columns.append((gradient(W + e) - gradient(W - e)) / (2 * step))
    # truncation of the differences is step² = 1e-10, their rounding 1e-16 / step = 1e-11
    torch.testing.assert_close(torch.stack(columns, 1), H, rtol=1e-7, atol=1e-8)
    inputs = torch.cat([x[0], torch.ones(1)])
    by_z = torch.autograd.functional.hessian(
        lambda z: F.cross_entropy(model[1:](z)[None], t), W @ inputs
    )
    torch.testing.assert_close(H, torch.kron(by_z, torch.outer(inputs, inputs)))


def enumerated(model, x, layer):
    """Exact Fisher block of [W, b] by enumerating labels, and the G whose expectation is exact."""
    p = model(x).softmax(1).detach()
    d = sum(q.numel() for q in layer.parameters())
    fisher = torch.zeros(d, d)
    for n in range(len(x)):
        for c in range(p.shape[1]):
            loss = F.cross_entropy(model(x[n : n + 1]), torch.tensor([c]))
            W, b = torch.autograd.grad(loss, [layer.weight, layer.bias])
            g = torch.cat([W, b[:, None]], 1).reshape(-1)
            fisher += p[n, c] * torch.outer(g, g) / len(x)
    return fisher


def expected_score(opt, classes):
    """Make an optimizer see every label with its probability: m examples become m * classes."""

    def score(z):
        p = z.softmax(1)
        each = p - F.one_hot(torch.arange(len(z)) % classes, classes).to(z)
        return each * (p.gather(1, torch.arange(len(z))[:, None] % classes) * classes).sqrt()

    opt._harness.capture.sample = score


def test_kfac_of_one_example_is_the_exact_fisher():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x = torch.randn(1, 3)
    for layer, name in ((model[0], "0"), (model[2], "2")):
        opt = KFAC(model, likelihood="categorical", decay=0.0)
        expected_score(opt, 3)
        opt.warm_up([lambda: model(x.repeat(3, 1))])  # row c stands for label c, weighed by p_c
        held = opt.curvature()[name]
        torch.testing.assert_close(torch.kron(held.left, held.right), enumerated(model, x, layer))


def test_kfac_of_a_linear_network_with_squared_error_is_exact():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(6, 3)
    opt = KFAC(model, likelihood="gaussian", decay=0.0)
    # unit scores in turn have the exact second moment I of Normal(z, 1), independent of x
    opt._harness.capture.sample = lambda z: 2**0.5 * F.one_hot(torch.arange(len(z)) % 2, 2).to(z)
    opt.warm_up([lambda: model(x.repeat_interleave(2, 0))])
    inputs = x
    for name, layer in (("0", model[0]), ("1", model[1])):
        a = torch.cat([inputs, torch.ones(6, 1)], 1)
        J = model[1].weight if name == "0" else torch.eye(2)
        exact = sum(torch.kron(J.T @ J, torch.outer(v, v)) for v in a) / 6
        held = opt.curvature()[name]
        torch.testing.assert_close(torch.kron(held.left, held.right), exact.detach())
        inputs = layer(inputs)


SIZES = (64, 60, 40, 8, 40, 60, 64)


def toy():
    """A 64-60-40-8-40-60-64 autoencoder and 4,000 soft-target vectors from 8 hidden numbers."""
    torch.manual_seed(3)
    hidden, basis = torch.randn(4000, 8), torch.randn(8, 64)
    layers = []
    for i, (a, b) in enumerate(pairwise(SIZES)):
        layers += [nn.Linear(a, b), nn.Identity() if i in (2, 5) else nn.ReLU()]
    return nn.Sequential(*layers), (hidden @ basis).sigmoid()


def train(make, epochs=20):
    model, data = toy()
    opt = make(model)
    order = torch.Generator().manual_seed(4)

    def full():
        with torch.no_grad():
            return loss_of(model, data).item()

    losses = [full()]
    if hasattr(opt, "warm_up"):
        opt.warm_up([lambda x=x: model(x) for x in data.split(200)])
    for _ in range(epochs):
        for rows in torch.randperm(4000, generator=order).split(200):

            def closure(x=data[rows]):
                opt.zero_grad()
                loss = loss_of(model, x)
                loss.backward()
                return loss

            opt.step(closure)
        losses.append(full())
    return losses, opt


def loss_of(model, x):
    return F.binary_cross_entropy_with_logits(model(x), x, reduction="sum") / len(x)


@pytest.mark.slow
def test_toy_autoencoder():
    """Indicative only: the published example's own data are not known, so orders are compared."""
    sgd, _ = train(
        lambda m: torch.optim.SGD(m.parameters(), lr=0.003, momentum=0.9)
    )  # 0.03 averaged
    kfac, _ = train(lambda m: KFAC(m, lr=0.3, damping=0.3))
    kbfgs, opt = train(lambda m: KBFGS(m, lr=0.3, damping=0.3))
    assert sgd[0] == pytest.approx(64 * 0.6931, rel=0.02)  # untrained logits are near 0
    for losses in (kfac, kbfgs):
        assert losses[-1] < losses[1] < losses[0]
        assert losses[-1] < sgd[-1]
        assert losses[5] < sgd[10]  # half the epochs and better
    counts = sum(state["counts"] for state in opt.state.values() if "counts" in state)
    accepted = dict(zip(opt._harness.counts, counts.tolist(), strict=True))
    # 400 steps of 6 layers: no pair is ever refused, as in the published example
    assert accepted["H_g accepted"] == accepted["H_a accepted"] == 2400
    assert accepted["H_g skipped"] == accepted["H_a skipped"] == accepted["not finite"] == 0
    assert accepted["second damping fired"] > accepted["Powell fired"] > 0
