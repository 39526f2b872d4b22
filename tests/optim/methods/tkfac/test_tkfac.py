"""TKFAC against its dense oracle and the trace of the exact Fisher blocks."""

import copy

import pytest
import torch

from kronscope.optim.capture.likelihoods import sampled_score
from kronscope.optim.methods.tkfac.formulas import add_moments_, balanced_inverse
from kronscope.optim.methods.tkfac.tkfac import TKFAC
from tests.optim.models import CASES, NAMES
from tests.optim.oracles import ORACLES
from tests.optim.oracles_base import Seen, copy_without_hooks, example_gradients

every_case = pytest.mark.parametrize("name", NAMES)
either_label = pytest.mark.parametrize("empirical", [False, True])


def dense(P):
    return P @ torch.eye(P.shape[0])


def labels_of(opt, case):
    """The score that the optimizer will sample next, and again with each call."""
    if opt._harness.labels is None:
        return None
    generator = torch.Generator()
    generator.set_state(opt._harness.labels.get_state())
    return lambda z: sampled_score(case.likelihood, z, generator)


def one_step(opt, case, batch):
    opt.zero_grad()
    case.loss(case.model, batch).backward()
    opt.step()


@every_case
@pytest.mark.parametrize(
    "hyper",
    [
        {"damping": 0.3},
        {"damping": 2.0, "weight_decay": 0.01, "update_every": 2, "refresh_every": 3},
        {"damping": 0.5, "weight_decay": 0.02, "decoupled": True, "decay": 0.5, "refresh_every": 2},
    ],
)
@either_label
def test_seven_steps_of_the_oracle(name, hyper, empirical):
    case = CASES[name](count=7)
    twin = copy.deepcopy(case.model)
    ours = {{"decoupled": "decoupled_weight_decay"}.get(k, k): v for k, v in hyper.items()}
    likelihood = "empirical" if empirical else case.likelihood
    opt = TKFAC(case.model, lr=0.3, likelihood=likelihood, **ours)
    oracle, score = ORACLES["TKFAC"](twin, case.loss, lr=0.3, **hyper), labels_of(opt, case)
    for batch in case.batches:
        one_step(opt, case, batch)
        oracle.step(batch, score)
        for own, other in zip(case.model.parameters(), oracle.model.parameters(), strict=True):
            # two orders of the same sums, seven steps, inverses of condition below 1e3
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)
    assert opt.preconditioner().keys() == oracle.P.keys()
    for layer, P in oracle.P.items():
        torch.testing.assert_close(dense(opt.preconditioner()[layer]), P, rtol=1e-9, atol=1e-10)
        C = oracle.curvature[layer]
        torch.testing.assert_close(dense(opt.curvature()[layer]), C, rtol=1e-9, atol=1e-10)


@every_case
@either_label
def test_trace_is_that_of_the_fisher(name, empirical):
    case = CASES[name]()
    opt = TKFAC(case.model, decay=0.0, likelihood="empirical" if empirical else case.likelihood)
    twin = copy_without_hooks(case.model)  # the model itself would sample labels
    seen = Seen(twin, case.loss, case.batches[0])
    traces = {}
    for (layer, j), (a, g, _) in seen.rows(labels_of(opt, case)).items():
        V = example_gradients(a, g)
        traces[layer, j] = sum(V_n.square().sum() for V_n in V) / len(V)
    one_step(opt, case, case.batches[0])
    for layer, C in opt.curvature().items():
        own = [t for (n, _), t in traces.items() if n == layer]
        d = C.shape[0] // len(own)  # the groups of a convolution have traces of their own
        for part, expected in zip(dense(C).diagonal().split(d), own, strict=True):
            torch.testing.assert_close(part.sum(), expected)


@pytest.mark.parametrize("positions", [1, 2, 4, 9])
@pytest.mark.parametrize(("out", "columns"), [(3, 6), (6, 3), (1, 5), (5, 1)])
def test_moments_of_gradients(positions, out, columns):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 4, positions, columns, generator=generator)
    g = torch.randn(2, 4, positions, out, generator=generator)
    L, R = torch.ones(2, out, out), torch.ones(2, columns, columns)
    left, right = L.clone(), R.clone()
    for s in range(2):
        for n in range(4):
            V = sum(torch.outer(g[s, n, t], a[s, n, t]) for t in range(positions))
            left[s] += V @ V.T
            right[s] += V.T @ V
    add_moments_(L, R, a, g)
    torch.testing.assert_close(L, left)
    torch.testing.assert_close(R, right)


def test_factors_have_equal_mean_eigenvalues_and_the_curvature_as_product():
    V = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    L, R = (V @ V.T)[None], (V.T @ V)[None]
    tiny = torch.full((1,), 1e-3)
    left, _ = balanced_inverse(L, tiny, 3 / 5)
    right, _ = balanced_inverse(R, tiny, 5 / 3)
    F_g, F_a = (torch.linalg.inv(M[0]) - 1e-3 * torch.eye(len(M[0])) for M in (left, right))
    torch.testing.assert_close(F_g.diagonal().mean(), F_a.diagonal().mean())
    # the inverse of R, which is singular, has condition 1e3
    expected = torch.kron(L[0], R[0]) / L[0].trace()
    torch.testing.assert_close(torch.kron(F_g, F_a), expected, rtol=1e-8, atol=1e-9)


def test_nothing_learned_is_plain_damping():
    inverse, ok = balanced_inverse(torch.zeros(1, 2, 2), torch.tensor([0.5]), 3.0)
    assert ok.all()
    torch.testing.assert_close(inverse[0], 2 * torch.eye(2))


def test_warm_up_is_the_mean_over_batches():
    case = CASES["shared"]()
    opt = TKFAC(case.model, likelihood=case.likelihood)
    oracle, score = (
        ORACLES["TKFAC"](case.model, case.loss, lr=0.1, damping=0.3),
        labels_of(opt, case),
    )
    before = [p.detach().clone() for p in case.model.parameters()]
    opt.warm_up([lambda x=x: case.model(x) for x, _ in case.batches[:3]])
    oracle.warm_up(case.batches[:3], score)
    for layer, C in oracle.curvature.items():
        torch.testing.assert_close(dense(opt.curvature()[layer]), C)
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))


def test_warm_up_with_the_labels_of_the_data():
    case = CASES["cnn"]()
    opt = TKFAC(case.model, likelihood="empirical")
    oracle = ORACLES["TKFAC"](case.model, case.loss, lr=0.1, damping=0.3)
    opt.warm_up([lambda b=b: case.loss(case.model, b).backward() for b in case.batches[:3]])
    oracle.warm_up(case.batches[:3])
    for layer, C in oracle.curvature.items():
        torch.testing.assert_close(dense(opt.curvature()[layer]), C)
    assert all(p.grad is None for p in case.model.parameters())


def test_failed_inverses_keep_the_last_good_one_then_stop():
    case = CASES["mlp"]()
    opt = TKFAC(case.model)
    one_step(opt, case, case.batches[0])
    state = opt.state[case.model[0].weight]
    good = state["L_inv"].clone()
    for batch in case.batches[1:3]:
        state["L"].copy_(torch.diag(torch.tensor([900.0, -800.0, 1.0, 1.0])))
        one_step(opt, case, batch)
        assert torch.equal(state["L_inv"], good)
    assert state["counts"].tolist() == [3, 3, 2, 0]
    state["L"].copy_(torch.diag(torch.tensor([900.0, -800.0, 1.0, 1.0])))
    with pytest.raises(RuntimeError, match=r"layer '0'.*3 times in a row; raise the damping"):
        one_step(opt, case, case.batches[3])
