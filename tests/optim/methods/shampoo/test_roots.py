"""Inverse roots, by eigenvalues and by Newton's iteration, against dense float64 powers."""

import pytest
import torch

from kronscope.optim.linalg.basics import eigh
from kronscope.optim.methods.shampoo import roots

METHODS = {"eigen": roots.eigen_root, "newton": roots.newton_root}
both = pytest.mark.parametrize("method", sorted(METHODS))


def psd(*spectra, seed=0):
    """One matrix for each spectrum, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for values in spectra:
        values = torch.as_tensor(values, dtype=torch.float64)
        shape = (len(values), len(values))
        Q, _ = torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64))
        made.append(Q @ torch.diag(values) @ Q.T)
    return torch.stack(made)


def dense_power(M, exponent):
    values, U = torch.linalg.eigh(M)
    return U @ torch.diag(values**exponent) @ U.T


def expected(stack, damping, p):
    eye = torch.eye(stack.shape[-1])
    return torch.stack(
        [dense_power(M + e * eye, -1 / p) for M, e in zip(stack, damping, strict=True)]
    )


@both
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6])
def test_roots_of_a_stack(method, p):
    stack = psd([5.0, 1.0, 0.2, 0.01], [300.0, 2.0, 0.0, 0.0], [1e-5, 1e-6, 1e-7, 0.0])
    damping = torch.tensor([0.1, 0.01, 1e-6])
    root, ok = METHODS[method](stack, damping, p)
    assert ok.tolist() == [True] * 3
    # Newton stops at an error of 1e-6, of which the root has about 1/p
    rtol = 1e-10 if method == "eigen" else 2e-6
    for own, right in zip(root, expected(stack, damping, p), strict=True):
        torch.testing.assert_close(own, right, rtol=rtol, atol=rtol * right.abs().max().item())


def test_members_that_are_done_wait_for_the_others():
    easy, hard = psd([1.0, 1.0, 1.0], [1e4, 1.0, 1e-4])[:, None]
    damping = torch.tensor([1e-6])
    together, _ = roots.newton_root(torch.cat([easy, hard]), damping.expand(2), 4)
    alone = [roots.newton_root(M, damping, 4)[0] for M in (easy, hard)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [2, 4, 6])
def test_iterations_suffice_for_what_the_precision_holds(dtype, p):
    least = 4 * torch.finfo(dtype).eps
    M = torch.diag(torch.tensor([1.0, 1.0, least], dtype=dtype))[None]
    root, ok = roots.newton_root(M, torch.zeros(1, dtype=dtype), p)
    assert ok
    # a diagonal stays one, so the small eigenvalue is as good as the large ones; the error of N
    # is at most 1e-6 (float32: a few rounding errors)
    torch.testing.assert_close(root[0, 2, 2].item(), least ** (-1 / p), rtol=1e-5, atol=0)


@both
def test_float32(method):
    stack, damping = psd([100.0, 3.0, 0.1, 0.0]), torch.tensor([3e-4])
    root, ok = METHODS[method](stack.float(), damping.float(), 4)
    assert ok
    right = expected(stack, damping, 4)
    # ‖M‖ eps / damping = 100 * 6e-8 / 3e-4 = 0.02 moves the smallest eigenvalue, its root a quarter
    torch.testing.assert_close(root.double(), right, rtol=0.005, atol=0.005 * right.max().item())


def test_rounding_below_zero_counts_as_zero():
    stack, damping = psd([4.0, 1.0, -1e-5]), torch.tensor([1e-6])
    root, ok = roots.eigen_root(stack, damping, 2)
    assert ok
    torch.testing.assert_close(root, expected(psd([4.0, 1.0, 0.0]), damping, 2))


@both
def test_indefinite_and_not_finite_are_refused_alone(method):
    stack = psd([4.0, 1.0], [4.0, -1.0], [-50.0, -50.0], [2.0, 1.0], [3.0, 1.0])
    stack[3, 0, 1], stack[4, 0, 0] = torch.nan, torch.inf
    damping = torch.full((5,), 0.1)
    root, ok = METHODS[method](stack, damping, 4)
    assert ok.tolist() == [True, False, False, False, False]
    torch.testing.assert_close(root[:1], expected(stack[:1], damping[:1], 4), rtol=1e-6, atol=0)


def test_a_decomposition_that_does_not_converge_spoils_nobody_else(monkeypatch):
    eigh = torch.linalg.eigh

    def picky(M):
        if bool((M[:, 0, 0].round() == 7.0).any()):
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(M)

    monkeypatch.setattr(torch.linalg, "eigh", picky)
    stack = torch.diag_embed(torch.tensor([[4.0, 1.0], [7.0, 1.0], [9.0, 1.0]]))
    root, ok = roots.eigen_root(stack, torch.zeros(3), 2)
    assert ok.tolist() == [True, False, True]
    torch.testing.assert_close(root[::2, 0, 0], torch.tensor([1 / 2, 1 / 3]))


def test_root_undoes_power_and_drops_rounding():
    M = psd([4.0, 1.0, 0.0])
    R = roots.root(M, 4)
    torch.testing.assert_close(torch.linalg.matrix_power(R, 4), M)
    # kept, a rounding error of 1e-16 would have the fourth root 1e-4
    assert torch.linalg.eigvalsh(R).abs().min() < 1e-12


def test_eigenvectors_among_many_zeros():
    """Of units that hardly ever fire; LAPACK in float32 does not converge on them as they are."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 100, generator=generator, dtype=torch.float32).relu()
    tiny = -19 - 20 * torch.rand(180, 1, generator=generator, dtype=torch.float32)
    X[:180] *= 10.0**tiny
    M = (X @ X.T / 200)[None]
    values, U = eigh(M)
    torch.testing.assert_close(U * values[:, None] @ U.mT, M, rtol=0, atol=3e-6 * M.max())
    torch.testing.assert_close(U.mT @ U, torch.eye(200).to(M)[None], rtol=0, atol=1e-5)
    root, ok = roots.eigen_root(M, torch.ones(1, dtype=torch.float32), 2)
    assert bool(ok)
    torch.testing.assert_close(root @ root @ (M + torch.eye(200).to(M)), torch.eye(200).to(M)[None])
