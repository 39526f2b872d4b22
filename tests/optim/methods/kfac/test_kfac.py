"""KFAC against a slow dense oracle, and its sampled labels against exact expectations."""

import pytest
import torch
from torch import nn

from kronscope.optim import KFAC
from kronscope.optim.capture.likelihoods import LIKELIHOODS, sampled_score
from kronscope.optim.linalg.products import second_moment
from tests.optim.cases import autoencoder, batches, blocks, closure_of, loss_of, train, w_bar


def dense_factors(model, x, score):
    """A and G of every layer, example by example, from the score at the output."""
    inputs, outputs, handles = {}, {}, []
    for name, layer in blocks(model).items():

        def keep(_, args, z, name=name):
            inputs[name], outputs[name] = args[0].detach(), z

        handles.append(layer.register_forward_hook(keep))
    output = model(x)
    grads = torch.autograd.grad(output, list(outputs.values()), score(output.detach()))
    for handle in handles:
        handle.remove()
    factors = {}
    for (name, a), g in zip(inputs.items(), grads, strict=True):
        a = torch.cat([a, torch.ones(len(a), 1)], 1)
        A = sum(torch.outer(v, v) for v in a) / len(a)
        G = sum(torch.outer(v, v) for v in g) / len(g)
        factors[name] = A, G
    return factors


def test_ten_steps_of_the_oracle():
    lr, damping, decay, every, tau = 0.5, 0.4, 0.8, 3, 1e-3
    model, data = autoencoder(), batches(10)
    twin = autoencoder()
    opt = KFAC(model, lr, damping, decay=decay, weight_decay=tau, refresh_every=every)
    labels = torch.Generator()
    labels.set_state(opt._harness.labels.get_state())
    A, G, M, inverse = {}, {}, {}, {}
    for k, x in enumerate(data):
        opt.step(closure_of(opt, model, x))
        factors = dense_factors(twin, x, lambda z: sampled_score("bernoulli", z, labels))
        twin.zero_grad()
        loss_of(twin, x).backward()
        for name, layer in blocks(twin).items():
            grad = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1)
            A_k, G_k = factors[name]
            A[name] = decay * A.get(name, 0) + (1 - decay) * A_k
            G[name] = decay * G.get(name, 0) + (1 - decay) * G_k
            M[name] = 0.9 * M.get(name, 0) + 0.1 * (grad + tau * w_bar(layer))
            if k <= every or k % every == 0:
                root = damping**0.5
                inverse[name] = [
                    torch.linalg.inv(F[name] + root * torch.eye(len(F[name]))) for F in (G, A)
                ]
            step = -lr * inverse[name][0] @ M[name] @ inverse[name][1]
            layer.weight.data += step[:, :-1]
            layer.bias.data += step[:, -1]
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            # two orders of the same sums, ten steps
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    state = opt.state[model[0].weight]
    assert state["counts"].tolist() == [10, 6, 0, 0]  # refreshed at 0, 1, 2, 3, 6, 9
    torch.testing.assert_close(opt.curvature()["0"].left, G["0"])
    torch.testing.assert_close(opt.curvature()["0"].right, A["0"])


def test_update_every():
    model, data = autoencoder(), batches(7)
    opt = KFAC(model, update_every=3)
    train(opt, model, data)
    assert opt.state[model[0].weight]["counts"][0] == 3  # steps 0, 3, 6
    assert opt.param_groups[0]["step"] == 7


EXACT = {
    "categorical": lambda z: (
        torch.diag_embed(z.softmax(1)) - z.softmax(1)[:, :, None] * z.softmax(1)[:, None]
    ),
    "bernoulli": lambda z: torch.diag_embed(z.sigmoid() * (1 - z.sigmoid())),
    "gaussian": lambda z: torch.eye(z.shape[1]).expand(len(z), -1, -1),
}


@pytest.mark.parametrize("name", sorted(LIKELIHOODS))
def test_sampled_fisher_approaches_the_expectation(name):
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(1, 3)
    draws = 4000
    opt = KFAC(model, likelihood=name)
    opt.warm_up([lambda: model(x.expand(draws, 3))])
    exact = EXACT[name](model(x).detach())[0]
    # entries are means of 4000 draws of size up to 1 (gaussian: up to 2 in variance):
    # standard error below 0.025, five of them
    torch.testing.assert_close(opt.state[model[0].weight]["G"], exact, rtol=0, atol=0.12)
    assert set(EXACT) == set(LIKELIHOODS)


def test_categorical_reaches_further_dimensions():
    output = torch.randn(5, 3, 2)
    labels = LIKELIHOODS["categorical"].sample(output, torch.Generator())
    assert labels.shape == (5, 2)
    z = output.clone().requires_grad_()
    nn.functional.cross_entropy(z, labels, reduction="sum").backward()
    torch.testing.assert_close(LIKELIHOODS["categorical"].score(output, labels), z.grad)


def test_scores_are_gradients_of_their_losses():
    z, t = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3)
    nn.functional.binary_cross_entropy_with_logits(z, t, reduction="sum").backward()
    torch.testing.assert_close(LIKELIHOODS["bernoulli"].score(z.detach(), t), z.grad)
    z.grad = None
    (0.5 * (z - t).square().sum()).backward()
    torch.testing.assert_close(LIKELIHOODS["gaussian"].score(z.detach(), t), z.grad)


def test_sampling_leaves_the_global_generator_alone():
    model, x = autoencoder(), batches(1)[0]
    opt = KFAC(model)
    before = torch.get_rng_state()
    train(opt, model, [x])
    assert torch.equal(torch.get_rng_state(), before)


def test_empirical_is_the_data_gradient():
    model, x = autoencoder(), batches(1)[0]
    opt = KFAC(model, likelihood="empirical", decay=0.0)
    factors = dense_factors(model, x, lambda z: z.sigmoid() - x)
    train(opt, model, [x])
    for name, product in opt.curvature().items():
        torch.testing.assert_close(product.right, factors[name][0])
        torch.testing.assert_close(product.left, factors[name][1])


def test_warm_up_is_the_mean_over_batches():
    model, data = autoencoder(), batches(3)
    before = [p.detach().clone() for p in model.parameters()]
    opt = KFAC(model)
    labels = torch.Generator()
    labels.set_state(opt._harness.labels.get_state())
    opt.warm_up([lambda x=x: model(x) for x in data])
    each = [dense_factors(model, x, lambda z: sampled_score("bernoulli", z, labels)) for x in data]
    for name, product in opt.curvature().items():
        for side, factor in ((1, product.left), (0, product.right)):
            torch.testing.assert_close(factor, sum(f[name][side] for f in each) / 3)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_failed_inverses_keep_the_last_good_one_then_stop():
    model, data = autoencoder(), batches(8)
    opt = KFAC(model)
    train(opt, model, data[:1])
    state = opt.state[model[0].weight]
    good = state["A_inv"].clone()
    for _ in range(2):
        state["A"].copy_(-50 * torch.eye(7))
        train(opt, model, data[:1])
        assert torch.equal(state["A_inv"], good)
    assert state["counts"][2] == 2
    state["A"].copy_(-50 * torch.eye(7))
    with pytest.raises(RuntimeError, match=r"layer '0'.*3 times in a row; raise the damping"):
        train(opt, model, data[:1])


@pytest.mark.parametrize("size", [3, 255, 256, 301])
def test_second_moment_in_pieces(size):
    x = torch.randn(20, size)
    a = torch.cat([x, torch.ones(20, 1)], 1)
    for ones, rows in ((True, a), (False, x)):
        mean = second_moment(None, x[None, :8], 0, ones=ones)
        mean = second_moment(mean, x[None, 8:], 8, ones=ones)
        torch.testing.assert_close(mean[0], rows.T @ rows / 20)
