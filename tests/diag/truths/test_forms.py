"""Stacks and the truths made of them, every form of every answer, against dense float64."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronscope.diag import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    dense,
    diagonal,
    inner,
)
from kronscope.diag.operators.batched import (
    Diagonals,
    Outer,
    Packed,
    cross_gram,
    difference,
    pack,
    unpack,
)
from kronscope.diag.operators.eigen import KroneckerEigen, Spectral
from kronscope.diag.truths.kronecker_terms import KroneckerTerms
from kronscope.diag.truths.low_rank_terms import LowRankTerms

N, O, I = 6, 3, 4  # noqa: E741


def symmetric(*shape):
    half = torch.randn(*shape)
    return half + half.mT


def stacks_and_matrices(n, k, r):
    """Every kind of stack of N matrices, with the matrices [N, k, k] themselves."""
    general, roots, values = symmetric(n, k, k), torch.randn(n, r, k), torch.rand(n, k)
    diagonals = torch.diag_embed(values)
    return {
        "packed": (Packed.of(general), general),
        "outer": (Outer(roots), torch.einsum("nrk,nrl->nkl", roots, roots)),
        "diagonals": (Diagonals(values), diagonals),
        "diagonals, packed": (Packed.of(diagonals), diagonals),
        "diagonals, outer": (Outer(diagonals.sqrt()), diagonals),
    }


KINDS = list(stacks_and_matrices(1, 1, 1))
SIZES = {"n": st.integers(1, 6), "k": st.integers(1, 6), "r": st.integers(1, 4)}


@given(seed=st.integers(0, 10_000), **SIZES)
@settings(max_examples=20, deadline=None)
def test_every_stack_answers_as_its_matrices_do(seed, n, k, r):
    torch.manual_seed(seed)
    one, several = torch.randn(k, k), torch.randn(3, k, k)
    v, weights = torch.randn(n, k, 2), torch.randn(3, n)
    for stack, M in stacks_and_matrices(n, k, r).values():
        assert stack.size == k
        rest = M - M.mean(0)
        for found, expected in [
            (stack.gram(), torch.einsum("nkl,mkl->nm", M, M)),
            (stack.centred_gram(), torch.einsum("nkl,mkl->nm", rest, rest)),
            (stack.inners(one), torch.einsum("nkl,kl->n", M, one)),
            (stack.inners(several), torch.einsum("nkl,rkl->nr", M, several)),
            (stack.mean(), M.mean(0)),
            (stack.diagonals(), M.diagonal(dim1=1, dim2=2)),
            (stack.matrices(), M),
            (stack.apply(v), M @ v),
            (stack.weighted(weights), torch.einsum("rn,nkl->rkl", weights, M)),
        ]:
            # entries of order 10 at most, sums of few: rounding stays below 1e-11
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


@given(seed=st.integers(0, 10_000), m=st.integers(1, 5), **SIZES)
@settings(max_examples=15, deadline=None)
def test_every_pair_of_stacks(seed, n, m, k, r):
    torch.manual_seed(seed)
    first, second = stacks_and_matrices(n, k, r), stacks_and_matrices(m, k, r)
    beside = stacks_and_matrices(n, k, r)
    for one, other in product(KINDS, KINDS):
        (left, M), (right, D), (third, E) = first[one], second[other], beside[other]
        crossed = torch.einsum("nkl,mkl->nm", M, D)
        torch.testing.assert_close(cross_gram(left, right), crossed, rtol=0, atol=1e-11)
        torch.testing.assert_close(difference(left, third).matrices(), M - E, rtol=0, atol=1e-12)
        own = torch.einsum("nkl,mkl->nm", M, M)
        torch.testing.assert_close(cross_gram(left, left), own, rtol=0, atol=1e-11)


@given(seed=st.integers(0, 10_000), k=st.integers(1, 12), lead=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_packing_and_unpacking(seed, k, lead):
    torch.manual_seed(seed)
    M = symmetric(*[2] * lead, k, k)
    packed = pack(M)
    assert packed.shape == (*[2] * lead, k * (k + 1) // 2)
    torch.testing.assert_close(unpack(packed, k), M)
    torch.testing.assert_close(packed.square().sum(-1), M.square().sum((-2, -1)))


def test_large_stacks_in_parts(monkeypatch):
    """Grams some columns at a time, squared blocks some rows, products some examples."""
    monkeypatch.setattr("kronscope.diag.operators.batched.COLUMNS", 5)
    roots = torch.randn(200, 12, 3)  # 200 x 12 x 12 squares do not fit 2^22 all at once
    M = roots.mT @ roots
    expected = M.flatten(1) @ M.flatten(1).T
    for stack in (Outer(roots), Packed.of(M)):
        torch.testing.assert_close(stack.gram(), expected)
        torch.testing.assert_close(cross_gram(stack, Packed.of(M)), expected)
    wide, v = symmetric(3, 1500, 1500), torch.randn(3, 1500, 1)  # one such matrix at a time
    torch.testing.assert_close(Packed.of(wide).apply(v), wide @ v)


@pytest.fixture(params=KINDS)
def mean(request):
    """KroneckerTerms of every kind of stack, with its terms [N, d, d]."""
    stack, C = stacks_and_matrices(N, O, 2)[request.param]
    return mean_and_terms(stack, C)


def mean_and_terms(stack, C):
    a = torch.randn(N, I)
    terms = torch.einsum("nop,ni,nj->noipj", C, a, a).reshape(N, O * I, O * I)
    return KroneckerTerms(a, stack), terms


def others():
    """Every structure of [12, 12] there is."""
    left, right, basis = symmetric(O, O), symmetric(I, I), torch.linalg.qr(torch.randn(12, 12)).Q
    U, W = torch.linalg.eigh(left).eigenvectors, torch.linalg.eigh(right).eigenvectors
    found = {
        "Kronecker": Kronecker(left, right),
        "KroneckerSum": KroneckerSum(symmetric(2, O, O), symmetric(2, I, I)),
        "Diagonal": Diagonal(torch.randn(12)),
        "BlockDiagonal": BlockDiagonal(symmetric(O, I, I)),
        "BlockDiagonal, listed": BlockDiagonal(list(symmetric(O, I, I))),
        "BlockDiagonal, other blocks": BlockDiagonal([symmetric(5, 5), symmetric(7, 7)]),
        "BlockDiagonal, reordered": BlockDiagonal(symmetric(O, I, I), torch.randperm(12)),
        "LowRank": LowRank(torch.randn(12, 2)),
        "KroneckerEigen": KroneckerEigen(U, W, torch.randn(O, I)),
        "Spectral": Spectral(basis[:, :3], torch.randn(3)),
        "Damped": Damped(Kronecker(left, right), 0.3),
        "Damped twice": Damped(Damped(Spectral(basis, torch.randn(12)), 0.3), 0.1),
        "Dense": Dense(symmetric(12, 12)),
        "Tensor": symmetric(12, 12),
        "LowRankTerms": LowRankTerms(torch.randn(5, 2, 12)),
    }
    for kind, (stack, C) in stacks_and_matrices(N, O, 2).items():
        found[f"KroneckerTerms, {kind}"] = mean_and_terms(stack, C)[0]
    return found


def check_against_terms(mean, terms):
    C = terms.mean(0)
    v, u, w = torch.randn(12, 3), *torch.randn(2, 12)
    torch.testing.assert_close(dense(mean), C)
    torch.testing.assert_close(mean @ v, C @ v)
    torch.testing.assert_close(mean @ u, C @ u)
    torch.testing.assert_close(diagonal(mean), C.diagonal())
    torch.testing.assert_close(mean.quadratic(u, w), torch.einsum("i,nij,j->n", u, terms, w))
    torch.testing.assert_close(mean.gram, torch.einsum("nij,mij->nm", terms, terms))
    structures = others()
    assert len(structures) == 20
    for name, other in structures.items():
        matrix = dense(other)
        expected = torch.einsum("nij,ij->n", terms, matrix)
        # sums of 144 products of order 10
        torch.testing.assert_close(mean.inners(other), expected, rtol=1e-9, atol=1e-10, msg=name)
        for value in (inner(mean, other), inner(other, mean)):
            assert value == pytest.approx(expected.mean().item(), rel=1e-9, abs=1e-10), name


def test_kronecker_terms_against_every_structure(mean):
    check_against_terms(*mean)


@pytest.mark.parametrize("at_once", [2**24, 1])
def test_low_rank_terms_against_every_structure(monkeypatch, at_once):
    monkeypatch.setattr("kronscope.diag.truths.low_rank_terms.AT_ONCE", at_once)
    V = torch.randn(N, 2, 12)
    check_against_terms(LowRankTerms(V), torch.einsum("nki,nkj->nij", V, V))
