"""Models with one output per example, of shape [N], and losses of shape [1]."""

import pytest
import torch
from torch import nn

from kronscope.diag import Problem, approximations, dense, exact, metrics
from kronscope.diag.backward.products import dense_block
from kronscope.diag.off_diagonal import block_norms
from kronscope.diag.truths.matrix_free import MatrixFree


def net(flat):
    layers = [nn.Conv1d(2, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(3, 1), *([nn.Flatten(0)] if flat else []))


def binary(loss, t):
    return (t > 0).double() if isinstance(loss, nn.BCEWithLogitsLoss) else t


@pytest.fixture(params=[nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=["mse", "logistic"])
def pair(request):
    """The same problem with outputs of shape [N] and [N, 1]."""
    x, t = torch.randn(7, 2, 3), binary(request.param, torch.randn(7))
    model = net(True)
    columns = net(False)
    columns.load_state_dict(model.state_dict())
    return Problem(model, request.param, x, t), Problem(columns, request.param, x, t[:, None])


@pytest.mark.parametrize("of", exact.TRUTHS)
def test_truths_are_those_of_one_column(pair, of):
    found, expected = pair
    for block in [*found.blocks(), found.group("all", [""])]:
        own = exact.truth(expected, block, of)
        torch.testing.assert_close(dense(exact.truth(found, block, of)), dense(own))
        slow = dense_block(found, block, of, 1, torch.Generator().manual_seed(0))
        torch.testing.assert_close(slow, dense(own))
    torch.testing.assert_close(*(block_norms(p, p.blocks(), of) for p in pair))


def test_what_is_built_on_them(pair, monkeypatch):
    for name in ("3", "0"):
        errors, rhos = [], []
        for problem in pair:
            block = problem.block(name)
            truth, kfac = exact.ggn(problem, block), approximations.kfac(problem, block)
            errors.append(metrics.relative_error(truth, kfac))
            rhos.append(metrics.rho(truth, kfac, 1.0, problem=problem, block=block))
        assert errors[0].value == pytest.approx(errors[1].value)
        for ends in ("low", "value", "high"):
            assert getattr(rhos[0], ends) == pytest.approx(getattr(rhos[1], ends))
    monkeypatch.setattr(exact, "DENSE_UP_TO", 0)
    for of in ("ggn", "empirical_fisher"):
        fresh = Problem(pair[0].model.requires_grad_(), pair[0].loss, *_data(pair[0]), budget=0)
        truth = exact.truth(fresh, fresh.group("all", [""]), of)
        assert isinstance(truth, MatrixFree)
        whole = dense(exact.truth(pair[1], pair[1].group("all", [""]), of))
        torch.testing.assert_close(truth @ torch.eye(len(whole)), whole)


def _data(problem):
    return problem.inputs, problem.targets


def test_backpack_gives_the_gradients(pair):
    problem = pair[0]
    block = problem.block("5")
    found = exact.empirical_fisher(problem, block, backend="backpack")
    torch.testing.assert_close(dense(found), dense(exact.empirical_fisher(problem, block)))


def test_a_loss_of_shape_1():
    def squares(z, t):
        return (z - t).square().mean().reshape(1)

    x, t = torch.randn(7, 2, 3), torch.randn(7, 1)
    model = net(False)
    found, expected = Problem(model, squares, x, t), Problem(model, nn.MSELoss(), x, t)
    for block in found.blocks():
        torch.testing.assert_close(found.gradient(block), expected.gradient(block))
        for of in exact.TRUTHS:
            own = dense(exact.truth(expected, block, of))
            torch.testing.assert_close(dense(exact.truth(found, block, of)), own)
        truth, kfac = exact.ggn(found, block), approximations.kfac(found, block)
        approximations.kbfgs(found, block, steps=3)
        metrics.rho(truth, kfac, 1.0, problem=found, block=block)
