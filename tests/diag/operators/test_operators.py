"""Every operator agrees with its own dense matrix; the list of constructors feeds all tests."""

import pytest
import torch

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
    diagonal,
    frobenius_norm,
    inner,
    inverse,
    solve,
    trace,
)
from kronscope.diag.operators.batched import pack, unpack
from kronscope.diag.spectra.preconditioned import square_root
from kronscope.diag.truths.kronecker_terms import KroneckerTerms


def spd(k: int) -> torch.Tensor:
    root = torch.randn(k, k)
    return root @ root.T + torch.eye(k)


def symmetric(*shape: int) -> torch.Tensor:
    matrix = torch.randn(*shape)
    return matrix + matrix.mT


OPERATORS = {
    "dense": lambda: Dense(spd(6)),
    "kronecker": lambda: Kronecker(spd(2), spd(3)),
    "kronecker_sum": lambda: KroneckerSum(
        torch.stack([spd(2), spd(2)]), torch.stack([spd(3), spd(3)])
    ),
    "kronecker_sum_of_one": lambda: KroneckerSum(spd(2)[None], spd(3)[None]),
    "block_diagonal": lambda: BlockDiagonal(torch.stack([spd(3), spd(3)])),
    "block_list": lambda: BlockDiagonal([spd(2), spd(4)]),
    "block_permuted": lambda: BlockDiagonal(
        torch.stack([spd(2), spd(2), spd(2)]), torch.tensor([0, 3, 1, 4, 2, 5])
    ),
    "diagonal": lambda: Diagonal(torch.rand(6) + 0.5),
    "low_rank": lambda: LowRank(torch.randn(6, 2)),
    "kronecker_terms": lambda: KroneckerTerms(
        torch.randn(7, 3), torch.stack([spd(2) for _ in range(7)])
    ),
    "damped": lambda: Damped(Kronecker(spd(2), spd(3)), 0.3),
    "inverse": lambda: Inverse(Kronecker(spd(2), spd(3))),
}


@pytest.fixture(params=OPERATORS, name="operator")
def _operator(request):
    return OPERATORS[request.param]()


def test_every_structure_is_covered():
    kinds = {type(make()) for make in OPERATORS.values()}
    assert len(kinds) == 9


def test_products(operator):
    v, many, matrix = torch.randn(6), torch.randn(6, 4), dense(operator)
    torch.testing.assert_close(operator @ v, matrix @ v)
    torch.testing.assert_close(operator @ many, matrix @ many)
    assert tuple(operator.shape) == (6, 6)


def test_diagonal_trace_norm(operator):
    matrix = dense(operator)
    torch.testing.assert_close(diagonal(operator), matrix.diagonal())
    assert trace(operator) == pytest.approx(matrix.trace().item(), rel=1e-12)
    assert frobenius_norm(operator) == pytest.approx(matrix.norm().item(), rel=1e-12)


@pytest.mark.parametrize("other", OPERATORS)
def test_inner(operator, other):
    second = OPERATORS[other]()
    expected = (dense(operator) * dense(second)).sum().item()
    assert inner(operator, second) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("damping", [0.0, 0.7])
def test_solve(operator, damping):
    if isinstance(operator, LowRank) and not damping:
        with pytest.raises(torch.linalg.LinAlgError, match="singular"):
            solve(operator, torch.randn(6))
        return
    v, many = torch.randn(6), torch.randn(6, 3)
    matrix = dense(Damped(operator, damping))
    torch.testing.assert_close(solve(Damped(operator, damping), v), torch.linalg.solve(matrix, v))
    torch.testing.assert_close(
        solve(Damped(operator, damping), many), torch.linalg.solve(matrix, many)
    )


def test_solve_of_an_indefinite_matrix():
    matrix = torch.diag(torch.tensor([2.0, -1.0, 3.0]))
    torch.testing.assert_close(solve(Dense(matrix), torch.ones(3)), 1 / matrix.diagonal())


def test_inverse(operator):
    if isinstance(operator, LowRank):
        operator = Damped(operator, 0.5)
    torch.testing.assert_close(dense(inverse(operator)), torch.linalg.inv(dense(operator)))


def test_square_root(operator):
    root, matrix, v = square_root(operator, 0.4), dense(Damped(operator, 0.4)), torch.randn(6)
    torch.testing.assert_close(root.apply(root.apply(v)), matrix @ v)
    torch.testing.assert_close(root.inverse(root.apply(v)), v)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"shapes differ: \(2, 2\) and \(3, 3\)"):
        inner(Diagonal(torch.ones(2)), Diagonal(torch.ones(3)))


def test_dense_refuses_beyond_the_budget():
    with pytest.raises(ValueError, match=r"over the budget of 0\.0 GiB; use operator @ v"):
        dense(Kronecker(torch.eye(10), torch.eye(10)), budget=1000)
    huge = Kronecker(torch.eye(300), torch.eye(300))
    with pytest.raises(ValueError, match=r"60\.3 GiB"):
        dense(huge)


def test_packing_keeps_inner_products():
    first, second = symmetric(4, 5, 5), symmetric(4, 5, 5)
    torch.testing.assert_close(
        (pack(first) * pack(second)).sum(1), (first * second).flatten(1).sum(1)
    )
    torch.testing.assert_close(unpack(pack(first), 5), first)


SINGULAR = {
    "diagonal": lambda: Diagonal(torch.tensor([0.0, 1.0, 0.0])),
    "kronecker": lambda: Kronecker(torch.diag(torch.tensor([1.0, 0.0])), torch.eye(3)),
    "indefinite": lambda: Kronecker(torch.diag(torch.tensor([1.0, -0.5])), torch.eye(1)),
}


@pytest.mark.parametrize(
    ("name", "damping", "zeros"),
    [("diagonal", 0.0, 2), ("kronecker", 0.0, 3), ("indefinite", 0.5, 1), ("diagonal", -1.0, 1)],
)
def test_a_singular_operator_is_refused(name, damping, zeros):
    operator = SINGULAR[name]()
    said = rf"{zeros} eigenvalues of a {type(operator).__name__} with damping \S+ are zero"
    with pytest.raises(torch.linalg.LinAlgError, match=said):
        solve(Damped(operator, damping), torch.ones(operator.shape[0]))
