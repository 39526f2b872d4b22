"""The truths against dense autograd, BackPACK and curvlinops."""

import pytest
import torch
from curvlinops import GGNLinearOperator, HessianLinearOperator
from torch import nn

from kronscope.diag import Problem, dense, exact, frobenius_norm, inner
from kronscope.diag.backward.products import dense_block
from kronscope.diag.operators import Dense, Kronecker
from kronscope.diag.spectra.kronecker_svd import leading_kronecker
from kronscope.diag.truths.kronecker_terms import KroneckerTerms

ACTIVATIONS = [nn.Tanh, nn.Sigmoid, nn.Softplus, nn.GELU, nn.ReLU]


def summed_logistic(z, t):
    return nn.functional.binary_cross_entropy_with_logits(z, t, reduction="sum") / len(z)


LOSSES = {
    "mse": (nn.MSELoss(), lambda n: torch.randn(n, 3)),
    "cross_entropy": (nn.CrossEntropyLoss(), lambda n: torch.randint(3, (n,))),
    "logistic": (summed_logistic, lambda n: torch.rand(n, 3)),
}


def close(actual, expected, rtol):
    """Relative to the largest entry: single tiny entries carry the rounding of large ones."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss_name", LOSSES)
@pytest.mark.parametrize("bias", [True, False])
def test_hessian_equals_torch_func(network, by_autograd, activation, loss_name, bias):
    loss, targets = LOSSES[loss_name]
    model = network([5, 4, 6, 3], activation, bias)
    problem = Problem(model, loss, torch.randn(12, 5), targets(12))
    for block in problem.blocks():
        truth = exact.hessian(problem, block)
        assert isinstance(truth, KroneckerTerms)
        # 1e-12: sums of some hundred products of order one in float64
        close(dense(truth), by_autograd(problem, block.name), 1e-12)


@pytest.mark.parametrize("of", exact.TRUTHS)
def test_both_routes_agree(classifier, of):
    """Per-example sums against d products over the parameters, for every way of cutting blocks."""
    blocks = [*classifier.blocks(), *classifier.blocks("tensor"), *classifier.blocks("unit")]
    assert len(blocks) == 3 + 6 + 12
    for block in blocks:
        generator = torch.Generator().manual_seed(0)
        expected = dense_block(classifier, block, of, 1, generator)
        close(dense(exact.truth(classifier, block, of)), expected, 1e-12)


@pytest.mark.parametrize("of", ["hessian", "ggn", "empirical_fisher"])
def test_group_holds_its_layers_and_what_couples_them(classifier, of):
    group = classifier.group("both", ["0", "2"])
    whole = dense(exact.truth(classifier, group, of))
    first, second = (classifier.block(name) for name in ("0", "2"))
    assert whole.shape == (first.d + second.d,) * 2
    close(whole[: first.d, : first.d], dense(exact.truth(classifier, first, of)), 1e-12)
    close(whole[first.d :, first.d :], dense(exact.truth(classifier, second, of)), 1e-12)
    assert whole[: first.d, first.d :].abs().max() > 1e-4


def test_ggn_of_backpack(network):
    for name in ("mse", "cross_entropy"):
        loss, targets = LOSSES[name]
        model = network([5, 4, 6, 3], nn.Tanh)
        problem = Problem(model, loss, torch.randn(12, 5), targets(12))
        for block in [*problem.blocks(), *problem.blocks("tensor"), problem.blocks("unit")[1]]:
            by_backpack = exact.ggn(problem, block, backend="backpack")
            close(dense(by_backpack), dense(exact.ggn(problem, block)), 1e-10)


def test_curvlinops(network):
    for name in ("mse", "cross_entropy"):
        loss, targets = LOSSES[name]
        model, x, t = network([5, 4, 6, 3], nn.Tanh), torch.randn(12, 5), targets(12)
        problem = Problem(model, loss, x, t)
        for peer, truth in [(HessianLinearOperator, exact.hessian), (GGNLinearOperator, exact.ggn)]:
            for block in problem.blocks("tensor"):
                parameter = model.get_parameter(block.name)
                operator = peer(model, loss, [parameter], [(x, t)], check_deterministic=False)
                close(dense(truth(problem, block)), operator @ torch.eye(block.d), 1e-9)


@pytest.mark.parametrize("loss_name", LOSSES)
def test_fisher_equals_ggn_for_a_log_likelihood(network, loss_name):
    loss, targets = LOSSES[loss_name]
    problem = Problem(network([5, 4, 3], nn.Tanh), loss, torch.randn(12, 5), targets(12))
    for block in problem.blocks():
        close(dense(exact.fisher(problem, block)), dense(exact.ggn(problem, block)), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("loss_name", LOSSES)
def test_sampled_fisher_tends_to_the_exact_one(network, loss_name):
    loss, targets = LOSSES[loss_name]
    problem = Problem(network([5, 4, 3], nn.Tanh), loss, torch.randn(12, 5), targets(12))
    block = problem.block("0")
    truth = dense(exact.fisher(problem, block))
    errors = []
    for samples in (100, 10_000):
        found = dense(exact.fisher_mc(problem, block, samples=samples))
        errors.append(((found - truth).norm() / truth.norm()).item())
    # standard error ~ 1/√(12·samples) times a factor of a few: 0.01 at 10,000 samples
    assert errors[1] < 0.02
    assert errors[1] < errors[0]


def test_fisher_refuses_a_loss_without_likelihood(network):
    loss = nn.L1Loss()
    problem = Problem(network([5, 3], None), loss, torch.randn(6, 5), torch.randn(6, 3))
    with pytest.raises(ValueError, match="no multiple of the negative log-likelihood"):
        exact.fisher(problem, problem.block("0"))
    other = Problem(
        network([5, 3], None),
        nn.MSELoss(),
        torch.randn(6, 5),
        torch.randn(6, 3),
        likelihood="poisson",
    )
    with pytest.raises(ValueError, match=r"no likelihood \['poisson'\]; known"):
        exact.fisher(other, other.block("0"))


def test_empirical_fisher_is_the_second_moment_of_gradients(classifier):
    block, rows = classifier.block("2"), []
    for x, t in zip(classifier.inputs, classifier.targets, strict=True):
        one = Problem(classifier.model.requires_grad_(True), classifier.loss, x[None], t[None])
        rows.append(one.gradient(one.block("2")))
    g = torch.stack(rows)
    close(dense(exact.empirical_fisher(classifier, block)), g.T @ g / len(g), 1e-12)


def test_relu_hessian_block_is_the_ggn_block(network):
    model = network([6, 8, 7, 3], nn.ReLU)
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(20, 6), torch.randint(3, (20,)))
    for block in problem.blocks():
        close(dense(exact.hessian(problem, block)), dense(exact.ggn(problem, block)), 1e-12)


def test_gram_quantities_equal_their_dense_counterparts(classifier):
    for block in classifier.blocks():
        for of in ("hessian", "ggn"):
            truth = exact.truth(classifier, block, of)
            matrix = dense(truth)
            o, i = truth.factor_sizes
            assert frobenius_norm(truth) == pytest.approx(matrix.norm().item(), rel=1e-10)
            B = Kronecker(torch.randn(o, o), torch.randn(i, i))
            assert inner(truth, B) == pytest.approx((matrix * dense(B)).sum().item(), rel=1e-10)
            tiles = matrix.reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
            expected = torch.linalg.svdvals(tiles)
            found = truth.kronecker_svd.values
            k = min(len(found), len(expected))
            close(found[:k], expected[:k], 1e-10)
            assert expected[k:].sum() < 1e-10 * expected[0]
            terms = leading_kronecker(Dense(matrix), k, block)
            close(terms.left.flatten(1).norm(dim=1), expected[:k], 1e-10)


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.norm = nn.LayerNorm(3)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        z = torch.tanh(self.conv(x)).mean((2, 3))
        return self.head(self.norm(z))


def test_any_layer_densely():
    model = Convolutional()
    x, t = torch.randn(6, 2, 5, 5), torch.randint(4, (6,))
    problem = Problem(model, nn.CrossEntropyLoss(), x, t)
    names = [block.name for block in problem.blocks()]
    assert names == ["conv", "norm", "head"]
    for block in problem.blocks():
        parameters = [model.get_parameter(n) for n in block.parameters]
        for peer, truth in [(HessianLinearOperator, exact.hessian), (GGNLinearOperator, exact.ggn)]:
            operator = peer(model, problem.loss, parameters, [(x, t)], check_deterministic=False)
            expected = operator @ torch.eye(block.d)
            # curvlinops puts all weights first; ours has the bias as last column of [W, b]
            order = block.join(
                {
                    n: part.reshape(p.shape)
                    for n, p, part in zip(
                        block.parameters,
                        parameters,
                        torch.arange(block.d).split([p.numel() for p in parameters]),
                        strict=True,
                    )
                }
            )
            close(dense(truth(problem, block)), expected[order][:, order], 1e-9)


class Shared(nn.Module):
    """One layer used at two positions of each example, another with its weight tied."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)
        self.outer = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.outer.weight

    def forward(self, x):
        positions = torch.tanh(self.inner(x))  # [n, 2, 3]
        return self.tied(torch.tanh(self.outer(positions.sum(1))))


def test_shared_weights_take_the_dense_route():
    problem = Problem(Shared(), nn.MSELoss(), torch.randn(5, 2, 3), torch.randn(5, 3))
    for block in problem.blocks():
        truth = exact.hessian(problem, block)
        assert isinstance(truth, Dense)
        assert truth.n == 5

        def value(v, block=block):
            return problem.loss(problem.outputs(block, v), problem.targets)

        close(dense(truth), torch.func.hessian(value)(torch.zeros(block.d)), 1e-12)


def test_unknown_names():
    problem = Problem(nn.Linear(2, 1), nn.MSELoss(), torch.randn(3, 2), torch.randn(3, 1))
    block = problem.blocks()[0]
    with pytest.raises(ValueError, match="no backend 'jax'; known"):
        exact.ggn(problem, block, backend="jax")
    with pytest.raises(ValueError, match="no truth 'fishy'; known"):
        exact.truth(problem, block, "fishy")
    with pytest.raises(ValueError, match="samples must be at least 1, not 0"):
        exact.fisher_mc(problem, block, samples=0)


def test_backpack_names_what_it_cannot_do():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Linear(3, 2))
    problem = Problem(model, nn.MSELoss(), torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"GELU.*backend='torch.func'"):
        exact.ggn(problem, problem.block("0"), backend="backpack")
    plain = Problem(
        nn.Linear(3, 2), lambda z, t: (z - t).square().mean(), torch.randn(4, 3), torch.randn(4, 2)
    )
    with pytest.raises(ValueError, match="needs the loss as a module"):
        exact.ggn(plain, plain.blocks()[0], backend="backpack")
