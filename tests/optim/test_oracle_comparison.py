"""KFAC and K-BFGS follow the slow dense oracles on a network, convolutions and shared weights."""

import copy

import pytest
import torch

from kronscope.optim import KBFGS, KFAC
from kronscope.optim.capture.likelihoods import sampled_score
from tests.optim.models import CASES, NAMES
from tests.optim.oracles import ORACLES

STEPS = 7


def run(opt, case, oracle, closure_only, factor=1.0):
    """Train both, comparing weights and preconditioners after every step.

    factor: by which the damping changes before every step.
    """
    labels = None
    if opt._harness.labels is not None:
        labels = torch.Generator()
        labels.set_state(opt._harness.labels.get_state())
    for batch in case.batches[:STEPS]:
        oracle.damping *= factor
        for group in opt.param_groups:
            group["damping"] *= factor

        def closure(batch=batch):
            opt.zero_grad()
            loss = case.loss(case.model, batch)
            loss.backward()
            return loss

        if closure_only:
            before = {n: dense(P) for n, P in opt.preconditioner().items()} if opt.state else None
            opt.step(closure)
            oracle.step(batch)
        else:
            closure()
            opt.step()
            score = None
            if labels is not None:
                kind = case.likelihood
                score = lambda z, kind=kind: sampled_score(kind, z, labels)  # noqa: E731
            oracle.step(batch, score)
            before = {n: dense(P) for n, P in opt.preconditioner().items()}
        own, other = case.model.state_dict(), oracle.model.state_dict()
        for name in own:
            # two orders of the same sums, seven steps, inverses of condition below 1e4
            torch.testing.assert_close(own[name], other[name], rtol=1e-9, atol=1e-10)
        for name in before or ():
            torch.testing.assert_close(before[name], oracle.P[name], rtol=1e-8, atol=1e-9)
        assert set(before or oracle.P) == set(oracle.P)


def ours(hyper):
    return {{"decoupled": "decoupled_weight_decay"}.get(k, k): v for k, v in hyper.items()}


def dense(P):
    return P @ torch.eye(P.shape[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "hyper",
    [
        {"damping": 0.3},
        {"damping": 2.0, "weight_decay": 0.01, "update_every": 2, "refresh_every": 3},
        {"damping": 0.5, "weight_decay": 0.02, "decoupled": True, "decay": 0.5},
    ],
)
@pytest.mark.parametrize("empirical", [False, True])
def test_kfac(name, hyper, empirical):
    case = CASES[name]()
    likelihood = "empirical" if empirical else case.likelihood
    twin = copy.deepcopy(case.model)
    opt = KFAC(case.model, lr=0.3, likelihood=likelihood, **ours(hyper))
    run(opt, case, ORACLES["KFAC"](twin, case.loss, lr=0.3, **hyper), closure_only=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "hyper",
    [
        {"damping": 0.3},
        {"damping": 0.9, "history": 3, "weight_decay": 0.01},
        {"damping": 0.5, "decoupled": True, "weight_decay": 0.05},
        {"damping": 0.3, "update_every": 3, "decay": 0.5, "weight_decay": 0.02},
        {"damping": 0.5, "pair_decay": 0.0},
        {"damping": 0.5, "pair_decay": 0.6, "decay": 0.8, "history": 4},
    ],
)
def test_kbfgs(name, hyper):
    case = CASES[name]()
    twin = copy.deepcopy(case.model)
    opt = KBFGS(case.model, lr=0.2, **ours(hyper))
    run(opt, case, ORACLES["KBFGS"](twin, case.loss, lr=0.2, **hyper), closure_only=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hyper", [{}, {"history": 3}])
def test_kbfgs_after_a_first_pass(name, hyper):
    """A starts from the mean over batches, rests at step 0, and gives the first H_a."""
    case = CASES[name]()
    oracle = ORACLES["KBFGS"](copy.deepcopy(case.model), case.loss, lr=0.2, damping=0.5, **hyper)
    opt = KBFGS(case.model, lr=0.2, damping=0.5, **hyper)
    first = case.batches[:3]
    opt.warm_up([lambda batch=batch: case.model(batch[0]) for batch in first])
    oracle.warm_up(first)
    run(opt, case, oracle, closure_only=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [0.7, 1.08])  # the oracle knows no damping >= 1
@pytest.mark.parametrize("method", [KBFGS, KFAC])
def test_a_damping_that_changes_every_step(name, factor, method):
    """K-BFGS's λ_A and mu_2 are of the step, H_a itself follows by its updates alone."""
    case, closure_only = CASES[name](), method is KBFGS
    oracle = ORACLES[method.__name__](copy.deepcopy(case.model), case.loss, lr=0.2, damping=0.5)
    own = {} if closure_only else {"likelihood": case.likelihood}
    opt = method(case.model, lr=0.2, damping=0.5, **own)
    run(opt, case, oracle, closure_only=closure_only, factor=factor)
