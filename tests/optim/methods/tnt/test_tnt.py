"""TNT against a slow dense oracle, and the scale of its covariances."""

from math import prod

import pytest
import torch
from torch import nn

from kronscope.optim.capture.likelihoods import sampled_score
from kronscope.optim.core import axes
from kronscope.optim.methods.tnt import covariances
from kronscope.optim.methods.tnt.tnt import TNT
from tests.optim.models import CASES as MODELS
from tests.optim.oracles import ORACLES

ORACLE = ORACLES["TNT"]
SETTINGS = {
    "plain": {},
    "rare": {"update_every": 2, "refresh_every": 3, "decay": 0.6},
    "coupled": {"weight_decay": 0.05, "decoupled_weight_decay": False, "momentum": 0.5},
    "decoupled": {"weight_decay": 0.05, "update_every": 3},
}


def dense(map_):
    return map_ @ torch.eye(map_.shape[0])


def train(case, opt, batches):
    for batch in batches:
        opt.zero_grad()
        case.loss(case.model, batch).backward()
        opt.step()


def pair(case, likelihood, **settings):
    """The optimizer, its oracle on the same model, and a score of the same labels."""
    settings = {"lr": 0.02, "damping": 0.6, "refresh_every": 2, **settings}
    opt = TNT(case.model, likelihood=likelihood, **settings)
    settings["decoupled"] = settings.pop("decoupled_weight_decay", None)
    oracle = ORACLE(case.model, case.loss, **settings)
    if likelihood == "empirical":
        return opt, oracle, None
    labels = torch.Generator()
    labels.set_state(opt._harness.labels.get_state())
    return opt, oracle, lambda z: sampled_score(likelihood, z, labels)


def same(case, opt, oracle):
    """Weights, preconditioner and curvature to rounding of two orders of the same sums."""
    for own, other in zip(case.model.parameters(), oracle.model.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)
    P, U = opt.preconditioner(), opt.curvature()
    assert P.keys() == U.keys() == oracle.P.keys()
    for name, right in oracle.P.items():
        torch.testing.assert_close(dense(P[name]), right, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(dense(U[name]), oracle.curvature[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("settings", sorted(SETTINGS))
@pytest.mark.parametrize("empirical", [False, True])
@pytest.mark.parametrize("case", sorted(MODELS))
def test_eight_steps_of_the_oracle(case, empirical, settings):
    made = MODELS[case]()
    likelihood = "empirical" if empirical else made.likelihood
    opt, oracle, score = pair(made, likelihood, **SETTINGS[settings])
    train(made, opt, made.batches[:8])
    for batch in made.batches[:8]:
        oracle.step(batch, score)
    same(made, opt, oracle)


@pytest.mark.parametrize("empirical", [False, True])
def test_warm_up_is_the_mean_over_batches(empirical):
    made = MODELS["cnn"]()
    likelihood = "empirical" if empirical else made.likelihood
    opt, oracle, score = pair(made, likelihood)
    if empirical:
        opt.warm_up([lambda b=b: made.loss(made.model, b).backward() for b in made.batches[:3]])
    else:
        opt.warm_up([lambda x=x: made.model(x) for x, _ in made.batches[:3]])
    oracle.warm_up(made.batches[:3], score)
    train(made, opt, made.batches[3:7])
    for batch in made.batches[3:7]:
        oracle.step(batch, score)
    same(made, opt, oracle)


@pytest.mark.parametrize("case", sorted(MODELS))
def test_trace_and_mean_eigenvalues(case):
    made = MODELS[case]()
    opt = TNT(made.model, likelihood=made.likelihood)
    train(made, opt, made.batches[:3])
    kinds = set()
    for stack in opt._harness.stacks:
        k = len(stack.shape)
        kinds.add(k)
        traces = [stack[f"H_{i + 1}"].diagonal(dim1=1, dim2=2).sum(1) for i in range(k)]
        U = [covariances.covariance(stack, i) for i in range(k)]
        for i in range(k):
            torch.testing.assert_close(traces[i], traces[0])
            means = [u.diagonal(dim1=1, dim2=2).mean(1) for u in U]
            torch.testing.assert_close(means[i], means[0])
        torch.testing.assert_close(prod(u.diagonal(dim1=1, dim2=2).sum(1) for u in U), traces[0])
    assert kinds == ({1, 2, 3} if case == "cnn" else {1, 2})


def test_an_axis_without_matrix_keeps_the_trace(monkeypatch):
    monkeypatch.setattr(axes, "LONGEST", 8)
    model = nn.Linear(9, 3)
    opt = TNT(model, likelihood="gaussian")
    opt.step(lambda: model(torch.randn(4, 9)).square().sum(1).mean().backward())
    U = dense(opt.curvature()["weight"])
    torch.testing.assert_close(U.trace(), opt.state[model.weight]["H_1"].trace())


def test_periods_and_counts():
    made = MODELS["mlp"]()
    opt = TNT(made.model, update_every=2, refresh_every=3)
    train(made, opt, made.batches[:8])
    # updates at 0, 2, 4, 6; inverses at 0, 2, 3, 6: at 1 nothing has changed
    assert opt.state[made.model[0].weight]["counts"].tolist() == [4, 4, 0, 0]


def test_no_gradient_leaves_only_the_damping():
    """A parameter that the loss knows and the model's output does not: H = 0."""
    model = nn.Linear(3, 2)
    model.extra = nn.Parameter(torch.ones(2, 3))
    opt = TNT(model, damping=0.5, likelihood="gaussian")
    opt.zero_grad()
    (model(torch.randn(4, 3)).square().sum(1).mean() + model.extra.square().sum()).backward()
    opt.step()
    torch.testing.assert_close(opt.state[model.extra]["inverse_1"], 2 * torch.eye(2))
    torch.testing.assert_close(opt.state[model.extra]["inverse_2"], 2 * torch.eye(3))


def test_fisher_divided_by_the_batch_size():
    """One linear layer, one input, unit variance: F = I ⊗ a aᵀ, TNT's trace is tr F / m."""
    torch.manual_seed(0)
    model, a, m, steps = nn.Linear(3, 2, bias=False), torch.tensor([1.0, 2.0, 2.0]), 5, 400
    opt = TNT(model, lr=0.0, decay=0.99, likelihood="gaussian", refresh_every=1000)
    opt.warm_up([lambda: model(a.expand(m, 3)) for _ in range(steps)])
    U = dense(opt.curvature()["weight"])
    exact = torch.kron(torch.eye(2), torch.outer(a, a)) / m
    # the variance of a squared normal is 2: relative standard error √(2/400) = 0.07; five of them
    torch.testing.assert_close(U, exact, rtol=0, atol=0.35 * exact.max().item())


def test_sampling_leaves_the_global_generator_alone():
    made = MODELS["mlp"]()
    opt = TNT(made.model)
    before = torch.get_rng_state()
    train(made, opt, made.batches[:2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("bad", [{"likelihood": "poisson"}, {"damping": -1.0}])
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TNT(MODELS["mlp"]().model, **bad)
