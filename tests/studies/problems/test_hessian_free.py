"""Hessian-free on the problems of its paper: products against dense matrices, and training."""

import pytest
import torch
from torch.func import functional_call

from kronscope.optim import HessianFree
from kronscope.optim.capture.likelihoods import FISHER
from kronscope.optim.methods.hessian_free.gauss_newton import GaussNewton
from kronscope.optim.methods.hessian_free.jacobians import DoubleBackward, Piece
from kronscope.studies import problems
from kronscope.studies.training import optimizers

SMALL = [name for name, p in problems.PROBLEMS.items() if p.partition and name.endswith("-small")]


def test_the_problems_are_there():
    assert sorted(SMALL) == [
        "cifar10-small-resnet-small",
        "mnist-autoencoder-tanh-small",
        "sequential-mnist-lstm-small",
    ]


def dense_ggn(model, x, likelihood):
    """(1/n) Σ Jᵀ H J over all parameters in the model's order."""
    names = [name for name, _ in model.named_parameters()]
    values = tuple(p.detach() for p in model.parameters())

    def outputs(*at):
        return functional_call(model, dict(zip(names, at, strict=True)), (x,))

    z = outputs(*values)
    jacobians = torch.autograd.functional.jacobian(outputs, values)
    J = torch.cat([j.reshape(z.numel(), -1) for j in jacobians], 1)
    units = torch.eye(z.numel()).reshape(-1, *z.shape)
    H = torch.stack([FISHER[likelihood](z, unit).reshape(-1) for unit in units])
    return J.T @ H @ J / len(z)


@pytest.mark.parametrize("name", SMALL)
def test_products_of_the_partition_equal_the_dense_matrix(name):
    problem = problems.get(name)
    torch.manual_seed(0)
    model = problem.model().double()
    x = problem.data().train_inputs[:3].double()
    G = dense_ggn(model, x, problem.likelihood)
    parts = HessianFree(model, likelihood=problem.likelihood, blocks=problem.partition).parts
    assert len(parts) == len(problem.partition)
    own = [part.parameters for part in parts]
    products = GaussNewton([Piece(model, 3, (x,))], own, problem.likelihood, DoubleBackward)
    order = {p: i for i, p in enumerate(model.parameters())}
    rows = torch.arange(len(G)).split([p.numel() for p in order])
    for number, part in enumerate(own):
        v = [torch.randn_like(p) for p in part]
        (found,) = products.products([number], [v])
        at = torch.cat([rows[order[p]] for p in part])
        expected = G[at][:, at] @ torch.cat([one.reshape(-1) for one in v])
        # thousands of terms in float64, relative to the largest entry
        error = (torch.cat([one.reshape(-1) for one in found]) - expected).abs().max()
        assert error <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("optimizer", ["hessian_free", "block_hessian_free"])
@pytest.mark.parametrize("name", SMALL)
def test_the_recommended_settings_lower_the_loss(name, optimizer):
    """Four steps on one batch, which is the curvature batch too."""
    problem = problems.get(name)
    data = problem.data()
    x, t = data.train_inputs[:40], data.train_targets[:40]
    torch.manual_seed(0)
    model = problem.model().to(x.dtype)
    opt = optimizers.make(optimizer, model, problem, {"curvature_batch": 40})

    def closure():
        opt.zero_grad()
        loss = problem.loss(model(x), t)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(4)]
    assert losses[-1] < 0.985 * losses[0]  # an LSTM leaves its plateau at log 10 slowly
