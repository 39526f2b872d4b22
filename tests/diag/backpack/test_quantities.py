"""The BackPACK engine against torch.func and against definitions."""

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, approximations, dense, diagonal, exact, metrics
from kronscope.diag.backpack import quantities as crosscheck
from kronscope.diag.truths.per_example import PerExampleTerms

# 1e-9 of the largest entry: float64 rounding of two engines, with room for sums of some thousands
CLOSE = 1e-9
EACH = pytest.mark.parametrize("loss", ["mse", "cross_entropy", "logistic"])
DIAGONALS = {
    "hessian": crosscheck.diag_hessian,
    "ggn": crosscheck.diag_ggn,
    "fisher_mc": crosscheck.diag_fisher_mc,
}
NETS = pytest.mark.parametrize("net", ["mlp", "cnn"])


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=CLOSE * expected.abs().max().item())


def made(net, loss, n=6):
    """A small classifier or regression, with one output for BackPACK's logistic loss."""
    out = 1 if loss == "logistic" else 3
    body = {
        "mlp": [nn.Linear(4, 5), nn.Tanh(), nn.Sequential(nn.Linear(5, 4), nn.Sigmoid())],
        "cnn": [nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten()],
    }[net]
    model = nn.Sequential(*body, nn.Linear(4 if net == "mlp" else 8, out))
    x = torch.randn(n, 4) if net == "mlp" else torch.randn(n, 1, 4, 4)
    criterion, t = {
        "mse": (nn.MSELoss(), torch.randn(n, out)),
        "cross_entropy": (nn.CrossEntropyLoss(), torch.randint(3, (n,))),
        "logistic": (nn.BCEWithLogitsLoss(), torch.randint(2, (n, 1)).to(x)),
    }[loss]
    return Problem(model, criterion, x, t)


def all_blocks(problem):
    layers = [block.name for block in problem.blocks()]
    found = [*problem.blocks(), *problem.blocks("tensor"), problem.blocks("unit")[1]]
    return [*found, problem.group("ends", [layers[0], layers[-1]])]


@EACH
@NETS
def test_full_blocks_agree(net, loss):
    problem = made(net, loss)
    for block in all_blocks(problem):
        for truth in (exact.ggn, exact.empirical_fisher):
            found = truth(problem, block, backend="backpack")
            assert isinstance(found, PerExampleTerms)
            close(dense(found), dense(truth(problem, block)))


@EACH
@NETS
def test_diagonals_agree(net, loss):
    problem = made(net, loss)
    for block in all_blocks(problem):
        close(crosscheck.diag_ggn(problem, block).diagonal, diagonal(exact.ggn(problem, block)))
        expected = dense(exact.hessian(problem, block)).diagonal()
        close(crosscheck.diag_hessian(problem, block).diagonal, expected)


@EACH
def test_per_example_terms_agree_too(loss):
    """So intervals do: from BackPACK's roots as from torch.func's."""
    problem = made("mlp", loss)
    block = problem.block("0")
    approx = approximations.kfac(problem, block)
    first = metrics.relative_error(exact.ggn(problem, block), approx)
    second = metrics.relative_error(exact.ggn(problem, block, backend="backpack"), approx)
    for end in ("value", "low", "high"):  # 1e-7: roots of differences of squares
        assert getattr(first, end) == pytest.approx(getattr(second, end), rel=1e-7, abs=1e-7)
    assert first.low < first.value < first.high


@EACH
def test_sampled_fisher(loss):
    """Repeats under a generator, differs between draws, tends to the Fisher like 1/√samples."""
    problem = made("mlp", loss)
    block = problem.block("0")
    one, same = (torch.Generator().manual_seed(5) for _ in range(2))
    first = dense(exact.fisher_mc(problem, block, 2, one, backend="backpack"))
    torch.testing.assert_close(
        first, dense(exact.fisher_mc(problem, block, 2, same, backend="backpack")), rtol=0, atol=0
    )
    second = dense(exact.fisher_mc(problem, block, 2, one, backend="backpack"))
    assert (first - second).abs().max() > 1e-3 * first.abs().max()
    twice = [crosscheck.diag_fisher_mc(problem, block, 2).diagonal for _ in range(2)]
    torch.testing.assert_close(*twice, rtol=0, atol=0)
    truth = dense(exact.fisher(problem, block))
    many = exact.fisher_mc(problem, block, 4000, backend="backpack")
    # standard error of a norm of 4,000 x 6 draws: about 1/√24,000, times a factor of a few
    assert (dense(many) - truth).norm() < 0.05 * truth.norm()
    found = crosscheck.diag_fisher_mc(problem, block, 4000).diagonal
    assert (found - truth.diagonal()).norm() < 0.05 * truth.diagonal().norm()
    # the same seed draws the same labels, whichever extension asks
    torch.testing.assert_close(found, diagonal(many))


@EACH
def test_kflr_of_linear_layers_is_kfac_of_the_ggn(loss):
    problem = made("mlp", loss)
    count = 0
    for block in [*problem.blocks(), *problem.blocks("tensor"), *problem.blocks("unit")]:
        for of in ("ggn", "fisher"):
            close(
                dense(approximations.kflr(problem, block, of=of)),
                dense(approximations.kfac(problem, block, of="ggn")),
            )
        count += 1
    assert count >= 12
    sampled = dense(crosscheck.kfac(problem, problem.block("0"), samples=4000))
    expected = dense(approximations.kfac(problem, problem.block("0"), of="ggn"))
    assert (sampled - expected).norm() < 0.05 * expected.norm()  # as for the sampled Fisher


def test_kflr_without_bias():
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(6, 4), torch.randint(3, (6,)))
    for block in problem.blocks():
        expected = dense(approximations.kfac(problem, block))
        close(dense(approximations.kflr(problem, block)), expected)


@pytest.mark.parametrize("name", ["one_example", "deep_linear_mse", "last_layer_mse"])
@pytest.mark.parametrize("of", ["ggn", "fisher"])
@pytest.mark.parametrize("method", ["kflr", "kfra"])
def test_exact_where_theory_says(case, name, of, method):
    problem, layer = case(name)
    block = problem.block(layer)
    found = approximations.registry[method].function(problem, block, of=of)
    close(dense(found), dense(exact.truth(problem, block, of)))


def test_kfra_by_hand():
    """One hidden layer: G of the first is mean_n(D_n Wᵀ mean_m(H_m) W D_n), D_n = tanh'(z_n)."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    problem = Problem(model, nn.CrossEntropyLoss(), torch.randn(6, 4), torch.randint(3, (6,)))
    h = torch.tanh(model[0](problem.inputs)).detach()
    p = model(problem.inputs).softmax(1).detach()
    H = (torch.diag_embed(p) - p[:, :, None] * p[:, None, :]).mean(0)
    W = model[2].weight.detach()
    D = torch.diag_embed(1 - h.square())
    G = (D @ (W.T @ H @ W) @ D).mean(0)
    a = torch.cat([problem.inputs, torch.ones(6, 1)], 1)
    found = approximations.kfra(problem, problem.block("0"))
    close(dense(found), torch.kron(G, a.T @ a / 6))
    kflr = dense(approximations.kflr(problem, problem.block("0")))
    assert (dense(found) - kflr).norm() > 1e-4 * kflr.norm()  # another matrix than KFLR


@pytest.mark.parametrize("method", ["kflr", "kfra"])
def test_convolution_is_scaled_to_the_block(method):
    """The bias's tile is BackPACK's factor; G/T ⊗ A is nearer to the block than its G ⊗ A."""
    problem = made("cnn", "cross_entropy", n=20)
    block, T = problem.block("0"), 16
    found = approximations.registry[method].function(problem, block)
    last = torch.arange(2) * 10 + 9  # [out, in+1] = [2, 10]
    of_bias = dense(approximations.registry[method].function(problem, problem.block("0.bias")))
    close(dense(found)[last][:, last], of_bias)
    truth = dense(exact.ggn(problem, block))
    if method == "kflr":
        close(of_bias, dense(exact.ggn(problem, problem.block("0.bias"))))
    assert (dense(found) - truth).norm() < (T * dense(found) - truth).norm()
    assert (dense(found) - truth).norm() < truth.norm()


def test_chosen_by_backend(classifier):
    """The approximations BackPACK has of its own, by the same names as ours."""
    block = classifier.block("0")
    for of, direct in DIAGONALS.items():
        found = approximations.diagonal(classifier, block, of=of, backend="backpack")
        torch.testing.assert_close(found.diagonal, direct(classifier, block).diagonal)
    ours = approximations.diagonal(classifier, block, of="hessian")
    theirs = approximations.diagonal(classifier, block, of="hessian", backend="backpack")
    torch.testing.assert_close(theirs.diagonal, ours.diagonal)
    sampled = approximations.kfac(classifier, block, of="fisher_mc", backend="backpack")
    torch.testing.assert_close(dense(sampled), dense(crosscheck.kfac(classifier, block)))
    with pytest.raises(ValueError, match="no backend 'backpac'; known"):
        approximations.kfac(classifier, block, backend="backpac")
    with pytest.raises(ValueError, match="BackPACK's KFAC is of='fisher_mc', not 'ggn'"):
        approximations.kfac(classifier, block, backend="backpack")
    with pytest.raises(ValueError, match="BackPACK has no diagonal of the fisher"):
        approximations.diagonal(classifier, block, of="fisher", backend="backpack")
