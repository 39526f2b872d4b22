"""Spectra against dense decompositions, and operators as SciPy sees them."""

import functools
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kronscope.diag import Problem, exact
from kronscope.diag.operators import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Inverse,
    Kronecker,
    KroneckerSum,
    LowRank,
    dense,
    like,
    to_scipy,
)
from kronscope.diag.operators.batched import Outer
from kronscope.diag.spectra import extreme_eigenpairs as spectrum
from kronscope.diag.spectra.eigenvalues import (
    eigenvalues,
    eigenvalues_in_any_order,
    gram_eigenvalues,
)
from kronscope.diag.spectra.extreme_eigenpairs import (
    NotConvergedError,
    bottom_eigenpairs,
    top_eigenpairs,
)
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms
from kronscope.diag.truths.matrix_free import MatrixFree


def spd(k: int) -> Tensor:
    root = torch.randn(k, k)
    return root @ root.T + torch.eye(k)


def symmetric(k: int) -> Tensor:
    matrix = torch.randn(k, k)
    return matrix + matrix.T


ORDER = torch.tensor([0, 3, 1, 4, 2, 5])
OPERATORS = {
    "tensor": lambda: symmetric(6),
    "dense": lambda: Dense(symmetric(6)),
    "kronecker": lambda: Kronecker(symmetric(2), symmetric(3)),
    "kronecker_sum": lambda: KroneckerSum(
        torch.stack([symmetric(2), symmetric(2)]), torch.stack([symmetric(3), symmetric(3)])
    ),
    "kronecker_sum_of_one": lambda: KroneckerSum(symmetric(2)[None], symmetric(3)[None]),
    "block_diagonal": lambda: BlockDiagonal(torch.stack([symmetric(3), symmetric(3)])),
    "block_list": lambda: BlockDiagonal([symmetric(2), symmetric(4)]),
    "block_permuted": lambda: BlockDiagonal(torch.stack([symmetric(2) for _ in range(3)]), ORDER),
    "diagonal": lambda: Diagonal(torch.randn(6)),
    "low_rank": lambda: LowRank(torch.randn(6, 2)),
    "low_rank_wide": lambda: LowRank(torch.randn(6, 9)),
    "kronecker_terms": lambda: KroneckerTerms(
        torch.randn(7, 3), torch.stack([spd(2) for _ in range(7)])
    ),
    "of_roots": lambda: KroneckerTerms(torch.randn(7, 3), Outer(torch.randn(7, 1, 2))),
    "of_few_roots": lambda: KroneckerTerms(torch.randn(2, 3), Outer(torch.randn(2, 2, 2))),
    "low_rank_terms": lambda: LowRankTerms(torch.randn(7, 2, 6)),
    "low_rank_terms_of_few": lambda: LowRankTerms(torch.randn(2, 2, 6)),
    "matrix_free": lambda: MatrixFree(functools.partial(torch.mul, 2.0), torch.ones(6), n=3),
    "damped": lambda: Damped(Kronecker(symmetric(2), symmetric(3)), 0.3),
    "inverse": lambda: Inverse(Kronecker(spd(2), spd(3))),
    "inverse_of_damped": lambda: Inverse(Damped(LowRank(torch.randn(6, 2)), 0.3)),
}


class Bare:
    """The least an operator owes: `.shape` and `@`; dtype and device from what it holds."""

    def __init__(self, matrix: Tensor) -> None:
        self.held = [matrix]
        self.shape = tuple(matrix.shape)

    def __matmul__(self, v: Tensor) -> Tensor:
        return self.held[0] @ v


@pytest.fixture(params=OPERATORS, name="operator")
def _operator(request):
    return OPERATORS[request.param]()


def decaying(d: int, power: float = 2.0) -> Tensor:
    """Matrix [d, d] with eigenvalues j^-power in a random basis."""
    basis = torch.linalg.qr(torch.randn(d, d))[0]
    return basis * torch.arange(1.0, d + 1) ** -power @ basis.T


# --- to_scipy


def test_every_structure_is_covered():
    kinds = {type(make()) for make in OPERATORS.values()}
    assert len(kinds) == 12


def test_to_scipy_glues_every_structure(operator):
    linear, matrix = to_scipy(operator), dense(operator).numpy()
    assert linear.dtype == np.float64
    assert linear.shape == (6, 6)
    v, many = np.random.default_rng(0).standard_normal(6), np.eye(6)
    np.testing.assert_allclose(linear @ many, matrix, atol=1e-12)
    np.testing.assert_allclose(linear.H @ many, matrix, atol=1e-12)  # rmatmat
    np.testing.assert_allclose(linear.matvec(v), matrix @ v, atol=1e-12)
    np.testing.assert_allclose(linear.rmatvec(v), matrix @ v, atol=1e-12)
    np.testing.assert_allclose(linear.matvec(v[:, None]), (matrix @ v)[:, None], atol=1e-12)
    np.testing.assert_allclose(linear @ v[::-1], matrix @ v[::-1], atol=1e-12)
    v.flags.writeable = False
    np.testing.assert_allclose(linear @ v, matrix @ v, atol=1e-12)


def test_to_scipy_in_eigsh_and_cg(operator):
    matrix = dense(operator).numpy()
    top = scipy.sparse.linalg.eigsh(to_scipy(operator), k=2, which="LA", v0=np.ones(6))[0]
    np.testing.assert_allclose(top, np.linalg.eigvalsh(matrix)[-2:], atol=1e-10)
    shift = 0.1 + abs(np.linalg.eigvalsh(matrix)).max()
    damped, b = Damped(operator, shift), np.arange(6.0)
    found, info = scipy.sparse.linalg.cg(to_scipy(damped), b, rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(found, np.linalg.solve(matrix + shift * np.eye(6), b), rtol=1e-8)


def test_to_scipy_of_truths(classifier):
    for of in ("ggn", "hessian"):
        for block in classifier.blocks():
            truth = exact.truth(classifier, block, of)
            found = to_scipy(truth) @ np.eye(block.d)
            np.testing.assert_allclose(found, dense(truth).numpy(), atol=1e-12)


def test_to_scipy_of_anything_with_shape_and_products():
    matrix = symmetric(5).float()
    linear = to_scipy(Bare(matrix))
    assert linear.dtype == np.float32
    np.testing.assert_array_equal(linear @ np.eye(5), matrix.numpy())
    assert (linear @ np.ones(5)).dtype == np.float32


def test_to_scipy_keeps_the_graph_out():
    matrix = symmetric(4).requires_grad_(True)
    np.testing.assert_array_equal(to_scipy(Dense(matrix)) @ np.eye(4), matrix.detach().numpy())


def test_to_scipy_refusals():
    with pytest.raises(TypeError, match=r"float32 and float64, not torch\.bfloat16.*this Diagonal"):
        to_scipy(Diagonal(torch.ones(3, dtype=torch.bfloat16)))
    with pytest.raises(TypeError, match=r"dtype and device of BlockDiagonal are unknown"):
        to_scipy(BlockDiagonal([]))
    with pytest.raises(TypeError, match="operators multiply real vectors"):
        to_scipy(Diagonal(torch.ones(2))) @ np.array([1j, 2])


def test_like_skips_what_is_not_floating():
    permuted = BlockDiagonal([torch.eye(2).float()], torch.tensor([1, 0]))
    assert like(permuted).dtype == torch.float32
    assert like(Inverse(Damped(permuted, 0.1))).dtype == torch.float32
    assert like(torch.eye(3)).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    d = 600
    matrix = decaying(d)
    operator = Dense(matrix.cuda())
    np.testing.assert_allclose(to_scipy(operator) @ np.eye(d), matrix.numpy(), atol=1e-12)
    pairs = top_eigenpairs(operator, k=3)
    assert pairs.vectors.is_cuda
    torch.testing.assert_close(pairs.values.cpu(), torch.arange(1.0, 4) ** -2)


# --- eigenvalues


def test_eigenvalues_of_every_structure(operator):
    expected = torch.linalg.eigvalsh(dense(operator))
    torch.testing.assert_close(eigenvalues(operator), expected, rtol=1e-9, atol=1e-9)


@given(d=st.integers(1, 8), k=st.integers(1, 8), seed=st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_gram_eigenvalues(d, k, seed):
    factor = torch.randn(d, k, generator=torch.Generator().manual_seed(seed))
    values = gram_eigenvalues(factor)
    assert (values[: max(d - k, 0)] == 0).all()
    expected = torch.linalg.eigvalsh(factor @ factor.T)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-10)


def test_eigenvalues_from_structure_beyond_the_dense_budget():
    d = 40_000  # a dense matrix would need 11.9 GiB
    left, right = spd(4), torch.rand(10_000)
    assert eigenvalues(Diagonal(torch.rand(d))).shape == (d,)
    low = eigenvalues(LowRank(torch.ones(d, 1)))
    assert low[-1].item() == pytest.approx(d)
    assert low[-2] == 0
    blocks = BlockDiagonal([left] * 10_000)
    assert eigenvalues(blocks)[-1].item() == pytest.approx(torch.linalg.eigvalsh(left)[-1].item())
    for kind in (Inverse(Damped(Diagonal(right.repeat(4)), 1.0)), Damped(Diagonal(right), 2.0)):
        assert (eigenvalues(kind) > 0).all()
    few = KroneckerTerms(torch.ones(1, d // 4), Outer(torch.ones(1, 2, 4)))
    assert eigenvalues(few)[-1].item() == pytest.approx(2 * 4 * d / 4)
    assert eigenvalues(LowRankTerms(torch.ones(1, 2, d)))[-2:].tolist() == pytest.approx([0, 2 * d])
    truth = KroneckerTerms(torch.ones(1, d // 4), torch.eye(4)[None])
    with pytest.raises(ValueError, match=r"KroneckerTerms of 40000 rows.*11\.9 GiB.*top_eigen"):
        eigenvalues(truth)
    with pytest.raises(ValueError, match="11\\.9 GiB"):
        top_eigenpairs(truth, k=d // 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvalues_of_truths(network, dtype):
    """Few examples, many weights: the small Gram matrix is used and the rest is zero."""
    model = network([6, 5, 3], torch.nn.Tanh).to(dtype)
    problem = Problem(
        model, torch.nn.CrossEntropyLoss(), torch.randn(4, 6).to(dtype), torch.arange(4) % 3
    )
    group = problem.group("both", ["0", "2"])
    close = (
        {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    )
    for block in (problem.block("0"), group):
        for of in ("ggn", "empirical_fisher"):
            truth = exact.truth(problem, block, of)
            values = eigenvalues(truth)
            assert values.dtype == dtype
            torch.testing.assert_close(values, torch.linalg.eigvalsh(dense(truth)), **close)


def test_a_new_structure_can_register():
    class Twice(Bare):
        pass

    @eigenvalues_in_any_order.register
    def _(operator: Twice) -> Tensor:
        return 2 * torch.linalg.eigvalsh(operator.held[0])

    matrix = symmetric(4)
    torch.testing.assert_close(eigenvalues(Twice(matrix)), 2 * torch.linalg.eigvalsh(matrix))


# --- extreme eigenpairs


@pytest.mark.parametrize("dense_up_to", [400, 0])
@pytest.mark.parametrize("extreme", [top_eigenpairs, bottom_eigenpairs])
def test_eigenpairs_by_both_routes(monkeypatch, dense_up_to, extreme):
    monkeypatch.setattr(spectrum, "DENSE_UP_TO", dense_up_to)
    matrix = symmetric(40)
    values = torch.linalg.eigvalsh(matrix)
    expected = values.flip(0)[:4] if extreme is top_eigenpairs else values[:4]
    for operator in (Dense(matrix), Bare(matrix)):
        pairs = extreme(operator, k=4)
        torch.testing.assert_close(pairs.values, expected, rtol=1e-10, atol=1e-10)
        gaps = matrix @ pairs.vectors - pairs.values * pairs.vectors
        torch.testing.assert_close(pairs.residuals, gaps.norm(dim=0), rtol=1e-6, atol=1e-13)
        assert pairs.residuals.max() < 1.5e-8 * values.abs().max()  # the tolerance asked for
        torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, torch.eye(4))
        again = extreme(operator, k=4)
        assert all(torch.equal(*pair) for pair in zip(pairs, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_copy_of_a_repeated_eigenvalue_is_found(dtype):
    """I ⊗ A has each eigenvalue ten times; a Krylov space shows one vector of each."""
    A = torch.diag(torch.arange(1.0, 61)).to(dtype)
    operator = Kronecker(torch.eye(10, dtype=dtype), A)
    loose = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0.0}
    expected = torch.tensor([60.0] * 10 + [59.0] * 2, dtype=dtype)
    pairs = top_eigenpairs(operator, k=12)
    assert pairs.values.dtype == pairs.vectors.dtype == pairs.residuals.dtype == dtype
    torch.testing.assert_close(pairs.values, expected, **loose)
    identity = torch.eye(12, dtype=dtype)
    torch.testing.assert_close(pairs.vectors.T @ pairs.vectors, identity, rtol=0, atol=1e-5)
    negated = Kronecker(-torch.eye(10, dtype=dtype), A)
    torch.testing.assert_close(bottom_eigenpairs(negated, k=12).values, -expected, **loose)


def test_eigenpairs_where_the_spectrum_is_zero():
    d, factor = 500, torch.randn(500, 2)
    pairs = top_eigenpairs(LowRank(factor), k=4)
    torch.testing.assert_close(pairs.values[:2], gram_eigenvalues(factor).flip(0)[:2])
    assert pairs.values[2:].abs().max() < 1e-10
    assert bottom_eigenpairs(LowRank(factor), k=2).values.abs().max() < 1e-10
    nothing = top_eigenpairs(Diagonal(torch.zeros(d)), k=2)
    assert (nothing.values == 0).all()
    torch.testing.assert_close(nothing.vectors.T @ nothing.vectors, torch.eye(2))


def test_eigenpairs_of_a_truth(classifier, monkeypatch):
    monkeypatch.setattr(spectrum, "DENSE_UP_TO", 0)
    block = classifier.block("0")
    truth = exact.hessian(classifier, block)
    values = torch.linalg.eigvalsh(dense(truth))
    assert values[0] < 0
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(top_eigenpairs(truth, k=3).values, values.flip(0)[:3], **close)
    torch.testing.assert_close(bottom_eigenpairs(truth, k=3).values, values[:3], **close)


def test_eigenpair_refusals():
    operator = Dense(symmetric(5))
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must be in \[1, d\] = \[1, 5\], not {k}"):
            top_eigenpairs(operator, k=k)
    hard = Diagonal(torch.linspace(0, 1, 3000))
    with pytest.raises(NotConvergedError, match=r"of 5 eigenpairs.*in 1 restarts.*larger tol"):
        top_eigenpairs(hard, k=5, tolerance=1e-13, iterations=1)
    with pytest.raises(ValueError, match="Diagonal is not finite: it holds NaN"):
        top_eigenpairs(Diagonal(torch.full((500,), math.nan)), k=1)
