"""EKFAC against its dense oracle, and its place between KFAC and the exact Fisher blocks."""

import copy

import pytest
import torch
from torch import nn

from kronscope.optim import EKFAC, KFAC, EKFACra
from kronscope.optim.capture.likelihoods import sampled_score
from kronscope.optim.linalg.operators import KroneckerEigen
from kronscope.optim.methods.ekfac.formulas import (
    carry_columns_,
    carry_rows_,
    eigenvectors,
    squares,
)
from tests.optim.models import CASES, NAMES
from tests.optim.oracles import ORACLES
from tests.optim.oracles_base import Seen, assembled, copy_without_hooks, example_gradients

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
        {"damping": 0.5, "ra": True, "weight_decay": 0.02, "refresh_every": 3},
    ],
)
@either_label
def test_seven_steps_of_the_oracle(name, hyper, empirical):
    # more examples than inputs of any layer: what is new of a batch in the null space of an A
    # that gave the eigenvectors would depend on which of them the solver has chosen there
    case = CASES[name](count=7, m=32)
    twin = copy.deepcopy(case.model)
    ours = {{"decoupled": "decoupled_weight_decay"}.get(k, k): v for k, v in hyper.items()}
    likelihood = "empirical" if empirical else case.likelihood
    method = EKFACra if ours.pop("ra", False) else EKFAC
    opt = method(case.model, lr=0.3, likelihood=likelihood, **ours)
    oracle, score = ORACLES["EKFAC"](twin, case.loss, lr=0.3, **hyper), labels_of(opt, case)
    for batch in case.batches:
        one_step(opt, case, batch)
        oracle.step(batch, score)
        for own, other in zip(case.model.parameters(), oracle.model.parameters(), strict=True):
            # two orders of the same sums, seven steps, eigenvalues apart by 1e-4 of the largest
            torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-11)
    assert opt.preconditioner().keys() == oracle.P.keys()
    for layer, P in oracle.P.items():
        torch.testing.assert_close(dense(opt.preconditioner()[layer]), P, rtol=1e-9, atol=1e-10)
        C = oracle.curvature[layer]
        torch.testing.assert_close(dense(opt.curvature()[layer]), C, rtol=1e-9, atol=1e-10)


def fisher(case, score):
    """{name: exact Fisher block of the first batch}, groups of a convolution apart."""
    twin = copy_without_hooks(case.model)  # the model itself would sample labels
    rows = Seen(twin, case.loss, case.batches[0]).rows(score)
    blocks = {}
    for key, (a, g, _) in rows.items():
        v = torch.stack([V.reshape(-1) for V in example_gradients(a, g)])
        blocks[key] = v.T @ v / len(v)
    return assembled(blocks)


@every_case
@either_label
def test_no_further_from_the_fisher_than_kfac(name, empirical):
    errors, case = {}, CASES[name]()
    likelihood = "empirical" if empirical else case.likelihood
    for method in (KFAC, EKFAC):
        case = CASES[name]()
        torch.manual_seed(3)
        opt = method(case.model, decay=0.0, likelihood=likelihood)
        truth = fisher(case, labels_of(opt, case))
        one_step(opt, case, case.batches[0])
        errors[method] = {n: (dense(C) - truth[n]).norm() for n, C in opt.curvature().items()}
        if method is EKFAC:
            for n, C in opt.curvature().items():
                torch.testing.assert_close(dense(C).trace(), truth[n].trace())
    assert len(errors[KFAC]) >= 3
    for n, error in errors[EKFAC].items():
        assert error < errors[KFAC][n]  # several examples: KFAC is exact nowhere here


def test_exact_for_one_example():
    case = CASES["mlp"](m=1)
    opt = EKFAC(case.model, decay=0.0)
    truth = fisher(case, labels_of(opt, case))
    one_step(opt, case, case.batches[0])
    for n, C in opt.curvature().items():
        torch.testing.assert_close(dense(C), truth[n])


@pytest.mark.parametrize("positions", [1, 2, 4, 9])
@pytest.mark.parametrize(("out", "columns"), [(3, 6), (6, 3), (1, 5), (5, 1), (1, 1)])
def test_squares_of_rotated_gradients(positions, out, columns):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    a, g = normal(2, 4, positions, columns), normal(2, 4, positions, out)
    U_A, U_G = normal(2, columns, columns), normal(2, out, out)
    expected = torch.zeros(2, out, columns)
    for s in range(2):
        for n in range(4):
            V = sum(torch.outer(g[s, n, t], a[s, n, t]) for t in range(positions))
            expected[s] += (U_G[s].T @ V @ U_A[s]).square()
    torch.testing.assert_close(squares(a, g, U_A, U_G), expected)


def orthogonal(n, seed):
    M = torch.randn(n, n, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(M).Q


def test_carried_values_are_the_diagonal_in_the_new_basis():
    S = torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0))
    old, new = [[orthogonal(n, seed) for n in (2, 3)] for seed in (1, 2)]
    U, V = torch.kron(*old), torch.kron(*new)
    expected = (V.T @ U @ torch.diag(S.reshape(-1)) @ U.T @ V).diagonal()
    carry_rows_(S, old[0][None], new[0][None])
    carry_columns_(S, old[1][None], new[1][None])
    torch.testing.assert_close(S.reshape(-1), expected)


def test_operator_on_vectors_and_matrices():
    left, right = orthogonal(2, 0), orthogonal(3, 1)
    values = torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    operator, U = KroneckerEigen(left, right, values), torch.kron(left, right)
    expected = U @ torch.diag(values.reshape(-1)) @ U.T
    assert operator.shape == expected.shape
    torch.testing.assert_close(dense(operator), expected)
    torch.testing.assert_close(operator @ torch.arange(6.0), expected @ torch.arange(6.0))


def test_eigenvectors_of_a_stack_of_which_some_fail(monkeypatch):
    M = torch.stack([torch.diag(torch.tensor([1.0, 2.0])), torch.full((2, 2), torch.nan)])
    M = torch.cat([M, 5 * torch.eye(2)[None]])
    _, ok = eigenvectors(M, torch.zeros(3))
    assert ok.tolist() == [True, False, True]
    eigh = torch.linalg.eigh

    def refusing(matrices):
        if (matrices[..., 0, 0].round() == 5).any():
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", refusing)
    U, ok = eigenvectors(M, torch.zeros(3))
    assert ok.tolist() == [True, False, False]
    torch.testing.assert_close(U[0].abs(), torch.eye(2))


def test_a_clearly_negative_eigenvalue_is_refused():
    M = torch.diag_embed(torch.tensor([[3.0, -1e-12], [3.0, -0.1], [-3.0, -3.0], [0.0, 0.0]]))
    assert eigenvectors(M, torch.zeros(4))[1].tolist() == [True, False, False, True]


def test_failures_keep_the_last_good_basis_then_stop(monkeypatch):
    case = CASES["mlp"]()
    opt = EKFAC(case.model)
    one_step(opt, case, case.batches[0])
    state = opt.state[case.model[0].weight]
    good = {key: state[key].clone() for key in ("U_A", "U_G")}

    def refusing(_):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", refusing)
    for batch in case.batches[1:3]:
        one_step(opt, case, batch)
    assert all(torch.equal(state[key], U) for key, U in good.items())
    assert state["counts"].tolist() == [3, 3, 4, 0]  # two factors failed twice
    with pytest.raises(RuntimeError, match=r"layer '0'.*3 times in a row; raise the damping"):
        one_step(opt, case, case.batches[3])


@either_label
def test_warm_up_starts_from_kfac(empirical):
    found = []
    for method in (KFAC, EKFAC):
        case = CASES["cnn"]()
        torch.manual_seed(3)
        opt = method(case.model, likelihood="empirical" if empirical else case.likelihood)

        def closure(batch, case=case):
            loss = case.loss(case.model, batch)
            if empirical:
                loss.backward()

        opt.warm_up([lambda b=b, closure=closure: closure(b) for b in case.batches[:3]])
        found.append({n: dense(C) for n, C in opt.curvature().items()})
    for n, C in found[0].items():
        torch.testing.assert_close(found[1][n], C)
    one_step(opt, case, case.batches[3])
    assert opt.state[case.model[0].weight]["counts"].tolist() == [1, 2, 0, 0]


def test_damping_acts_at_once():
    case = CASES["mlp"]()
    opt = EKFAC(case.model, refresh_every=5)
    one_step(opt, case, case.batches[0])
    S = dense(opt.curvature()["0"])
    opt.param_groups[0]["damping"] = 7.0
    expected = torch.linalg.inv(S + 7.0 * torch.eye(len(S)))
    torch.testing.assert_close(dense(opt.preconditioner()["0"]), expected)


def test_a_layer_that_joins_late_and_one_that_rests():
    """Layers of one shape share a stack; each has its own history all the same."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
    opt = EKFAC(model, lr=0.1, damping=0.5, likelihood="empirical", refresh_every=1)
    alone = copy.deepcopy(model[1])
    single = EKFAC(alone, lr=0.1, damping=0.5, likelihood="empirical", refresh_every=1)
    x = torch.randn(6, 5, 3)
    for k in range(6):
        opt.zero_grad()
        used = [layer for j, layer in enumerate(model) if (j == 1) == (k >= 3)]
        sum(0.5 * layer(x[k]).square().sum() / 5 for layer in used).backward()
        opt.step()
        if k >= 3:
            single.zero_grad()
            (0.5 * alone(x[k]).square().sum() / 5).backward()
            single.step()
    torch.testing.assert_close(model[1].weight, alone.weight, rtol=1e-10, atol=1e-12)
    state, own = opt.state[model[1].weight], single.state[alone.weight]
    assert state["counts"].tolist() == own["counts"].tolist() == [3, 3, 0, 0]
    assert opt.state[model[0].weight]["counts"].tolist() == [3, 6, 0, 0]


def test_a_basis_found_at_the_second_try_takes_the_scalings_with_it(monkeypatch):
    """A retry is in float64 and replaces the basis by itself, on a GPU at a later step."""

    def only_in_float64(M, dampings):
        if M.dtype == torch.float32:
            return torch.zeros_like(M), torch.zeros(len(M), dtype=torch.bool)
        return eigenvectors(M, dampings)

    def at_once(M, dampings):
        U, ok = eigenvectors(M.double(), dampings)
        return U.to(M.dtype), ok

    found = []
    for solver in (only_in_float64, at_once):
        monkeypatch.setattr("kronscope.optim.methods.ekfac.ekfac.eigenvectors", solver)
        case = CASES["mlp"]()
        case.model.float()
        opt = EKFAC(case.model, likelihood="empirical")
        for x, t in case.batches[:4]:
            one_step(opt, case, (x.float(), t.float()))
        found.append(opt)
        assert opt.state[case.model[0].weight]["counts"].tolist() == [4, 4, 0, 0]
    for own, other in zip(found[0].state.values(), found[1].state.values(), strict=True):
        for key in own:
            # until the second try S is carried over to the basis it is in: the identity to rounding
            torch.testing.assert_close(own[key], other[key], rtol=1e-5, atol=1e-6)
