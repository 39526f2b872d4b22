"""Which likelihood a loss belongs to: found where it fits, not where it happens to fit."""

import pytest
import torch
from torch import nn
from torch.nn.functional import l1_loss

from kronscope.diag import Problem, dense, exact
from kronscope.diag.backward.likelihoods import LIKELIHOODS


def net(c, silent=False):
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, c))
    if silent:  # all outputs are 0
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
    return model


def fisher_is_ggn(problem):
    for block in problem.blocks():
        expected = dense(exact.ggn(problem, block))
        # the terms of both are the same up to rounding
        torch.testing.assert_close(dense(exact.fisher(problem, block)), expected)
    assert expected.abs().max() > 0  # the last layer's


@pytest.mark.parametrize("target", [3.0, 1.0, 0.5, 0.0])
def test_one_example_with_one_output(target):
    x = torch.randn(1, 2)
    fisher_is_ggn(Problem(net(1), nn.MSELoss(), x, torch.full((1, 1), target)))
    if target <= 1:
        logistic = nn.BCEWithLogitsLoss()
        fisher_is_ggn(Problem(net(1), logistic, x, torch.full((1, 1), target)))


def test_equal_rows():
    x = torch.randn(1, 2).expand(8, 2)
    fisher_is_ggn(Problem(net(1), nn.MSELoss(), x, torch.ones(8, 1)))


@pytest.mark.parametrize("c", [1, 2])
def test_outputs_and_targets_that_are_constant(c):
    t = torch.zeros(30, c)
    t[:, 1:] = 1  # with two outputs rows of probabilities
    problem = Problem(net(c, silent=True), nn.BCEWithLogitsLoss(), torch.randn(30, 2), t)
    fisher_is_ggn(problem)
    fisher_is_ggn(Problem(net(c, silent=True), nn.MSELoss(), torch.randn(30, 2), t))


def test_targets_far_from_the_outputs():
    """Where z and its sigmoid are the same next to the targets."""
    t = 1e5 * (1 + torch.rand(20, 1))
    fisher_is_ggn(Problem(net(1), nn.MSELoss(), torch.randn(20, 2), t))


def test_target_probabilities():
    loss, x = nn.CrossEntropyLoss(), torch.randn(9, 2)
    fisher_is_ggn(Problem(net(3), loss, x, torch.rand(9, 3).softmax(1)))
    problem = Problem(net(3), loss, x, torch.rand(9, 3))
    with pytest.raises(ValueError, match="no multiple of the negative log-likelihood"):
        exact.fisher(problem, problem.block("2"))


@pytest.mark.parametrize("likelihood", [None, "categorical", "gaussian"])
def test_a_loss_without_likelihood_is_refused(likelihood):
    problem = Problem(net(1), l1_loss, torch.randn(1, 2), -torch.ones(1, 1), likelihood=likelihood)
    with pytest.raises(ValueError, match="no multiple of the negative log-likelihood"):
        exact.fisher(problem, problem.block("2"))


def test_a_loss_of_probabilities_alone_is_refused():
    model = nn.Sequential(net(1), nn.Sigmoid())
    problem = Problem(model, nn.BCELoss(), torch.randn(1, 2), torch.ones(1, 1))
    with pytest.raises(ValueError, match="no multiple of the negative log-likelihood"):
        exact.fisher(problem, problem.block("0.2"))

    def on_the_simplex(p, t):
        return -torch.distributions.Categorical(probs=p, validate_args=True).log_prob(t).mean()

    model = nn.Sequential(net(2), nn.Softmax(1))
    problem = Problem(model, on_the_simplex, torch.randn(1, 2), torch.ones(1).long())
    with pytest.raises(ValueError, match="no multiple of the negative log-likelihood"):
        exact.fisher(problem, problem.block("0.2"))


def test_two_likelihoods_that_fit_are_a_question(monkeypatch):
    monkeypatch.setitem(LIKELIHOODS, "normal", LIKELIHOODS["gaussian"])
    x, t = torch.randn(5, 2), torch.randn(5, 1)
    problem = Problem(net(1), nn.MSELoss(), x, t)
    with pytest.raises(ValueError, match=r"'gaussian' and 'normal'.*likelihood="):
        exact.fisher(problem, problem.block("2"))
    fisher_is_ggn(Problem(net(1), nn.MSELoss(), x, t, likelihood="normal"))
