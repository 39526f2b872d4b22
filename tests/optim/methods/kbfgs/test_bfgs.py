"""The formulas of K-BFGS: inequalities, secant equation, compact form, Hessian action."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronscope.optim.linalg.operators import CompactInverse, Kronecker
from kronscope.optim.methods.kbfgs.bfgs import (
    MU_1,
    acceptable,
    append_,
    bfgs_,
    double_damping,
    powell_and_shift,
    powell_on_h,
    second_damping,
    times,
)

YES = torch.tensor(True)
SEEDS = st.integers(0, 2**31 - 1)


def spd(n, generator):
    L = torch.randn(n, n, generator=generator)
    return L @ L.T + 0.1 * torch.eye(n)


def empty(p, n):
    return CompactInverse(torch.zeros(p, n), torch.zeros(p, n), torch.eye(p), torch.zeros(p, p))


@pytest.mark.parametrize("mu_2", [0.1, 0.55, 1.0, 1.73])
@settings(max_examples=60, deadline=None)
@given(seed=SEEDS, lean=st.floats(-1, 1), size=st.floats(-3, 3))
def test_double_damping_inequalities(mu_2, seed, lean, size):
    generator = torch.Generator().manual_seed(seed)
    s, y = torch.randn(2, 5, generator=generator)
    y = 10**size * (lean * s + y)
    H = spd(5, generator)
    s_new, _ = powell_on_h(s, y, H @ y)
    yHy = y @ H @ y
    # differences of numbers of this size are taken: 1e-9 is 1e7 roundings
    assert s_new @ y >= MU_1 * yHy - 1e-9 * (yHy + s_new.norm() * y.norm())
    y_new, _ = second_damping(s_new, y, mu_2)
    slack = 1e-9 * (s_new @ s_new + s_new.norm() * (y.norm() + y_new.norm()))
    assert s_new @ y_new >= mu_2 * (s_new @ s_new) - slack


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, mu_2=st.floats(0.05, 5))
def test_damping_of_convolutions(seed, mu_2):
    generator = torch.Generator().manual_seed(seed)
    s, y = torch.randn(2, 3, 5, generator=generator)  # a stack of three
    H = torch.stack([spd(5, generator) for _ in range(3)])
    pair = powell_and_shift(s, y, H, mu_2)
    yHy, ss = (y * times(H, y)).sum(-1), pair.s.square().sum(-1)
    assert pair.valid.all()
    slack = 1e-9 * (yHy + (1 + mu_2) * ss + y.square().sum(-1))
    assert ((pair.s * pair.y).sum(-1) >= MU_1 * yHy + mu_2 * ss - slack).all()


def test_a_stack_is_its_members():
    generator = torch.Generator().manual_seed(1)
    H = torch.stack([spd(5, generator) for _ in range(3)])
    s, y = torch.randn(2, 3, 5, generator=generator)
    pair = double_damping(s, y, H, 0.5)
    accept = torch.tensor([True, False, True])
    p = 2
    stacked = CompactInverse(
        torch.zeros(3, p, 5),
        torch.zeros(3, p, 5),
        torch.eye(p).repeat(3, 1, 1),
        torch.zeros(3, p, p),
    )
    whole = H.clone()
    bfgs_(whole, pair.s, pair.y, accept)
    append_(stacked, pair.s, pair.y, accept)
    assert stacked.shape == (3, 5, 5)
    for i in range(3):
        own, alone, single = double_damping(s[i], y[i], H[i], 0.5), H[i].clone(), empty(p, 5)
        bfgs_(alone, own.s, own.y, accept[i])
        append_(single, own.s, own.y, accept[i])
        torch.testing.assert_close(whole[i], alone)
        torch.testing.assert_close(stacked[i] @ torch.eye(5), single @ torch.eye(5))


def test_second_damping_stays_finite_where_theta_does_not():
    s = torch.tensor([1.0, 2.0])
    y, fired = second_damping(s, s.clone(), 1.73)  # s·s - s·y = 0
    assert fired
    assert torch.isfinite(y).all()
    torch.testing.assert_close(s @ y, 1.73 * (s @ s))


def test_pair_of_zeros_is_invalid_and_changes_nothing():
    zero, H = torch.zeros(3), 2 * torch.eye(3)
    pair = double_damping(zero, zero, H, 0.5)
    assert not pair.valid & acceptable(pair.s, pair.y, zero)
    assert not bfgs_(H, pair.s, pair.y, torch.tensor(False))
    assert torch.equal(H, 2 * torch.eye(3))


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS)
def test_secant_equation_and_positive_definite(seed):
    generator = torch.Generator().manual_seed(seed)
    H, compact = spd(4, generator), empty(3, 4)
    pair = double_damping(*torch.randn(2, 4, generator=generator), H, 0.55)
    assert bfgs_(H, pair.s, pair.y, YES)
    append_(compact, pair.s, pair.y, YES)
    # H holds s sᵀ / s·y, which cancels against the rest when s·y is small
    scale = 1e-9 * H.norm() * pair.y.norm()
    assert (H @ pair.y - pair.s).norm() <= scale
    assert (compact @ pair.y - pair.s).norm() <= 1e-9 * (pair.s.norm() + pair.y.norm())
    assert torch.linalg.eigvalsh(H).min() > -1e-9 * H.norm()


def test_update_equals_the_textbook_product_form():
    generator = torch.Generator().manual_seed(3)
    H, s = spd(4, generator), torch.randn(4, generator=generator)
    y = spd(4, generator) @ s
    V = torch.eye(4) - torch.outer(s, y) / (s @ y)
    expected = V @ H @ V.T + torch.outer(s, s) / (s @ y)
    bfgs_(H, s, y, YES)
    torch.testing.assert_close(H, expected)


def test_skip_rules():
    s = torch.tensor([1.0, 0.0])
    assert acceptable(s, s, s)
    assert not acceptable(s, -s, s)  # s·y <= 0
    assert not acceptable(s, 0.9e-4 * s, s)  # too little curvature for this gradient
    assert acceptable(s, 0.9e-4 * s, 0.5 * s)
    assert not acceptable(s * float("nan"), s, s)
    assert not acceptable(s, s, s * float("nan"))
    H = torch.eye(2)
    assert not bfgs_(H, 1e160 * s, 1e-160 * s, YES)  # s sᵀ / s·y overflows
    assert torch.equal(H, torch.eye(2))


@pytest.mark.parametrize("pairs", [1, 3, 4, 9])
def test_compact_form_equals_the_recursion_on_the_last_pairs(pairs):
    generator = torch.Generator().manual_seed(pairs)
    compact, kept = empty(4, 6), []
    for i in range(pairs):
        s = torch.randn(6, generator=generator)
        y = spd(6, generator) @ s
        accept = torch.tensor(i != 2)
        append_(compact, s, y, accept)
        kept += [(s, y)] if accept else []
    H = torch.eye(6)
    for s, y in kept[-4:]:
        bfgs_(H, s, y, YES)
    torch.testing.assert_close(compact @ torch.eye(6), H, rtol=1e-9, atol=1e-9)
    v = torch.randn(6, generator=generator)
    torch.testing.assert_close(compact @ v, H @ v, rtol=1e-9, atol=1e-9)
    assert compact.shape == H.shape


def test_hessian_action_converges_on_the_visited_subspace():
    generator = torch.Generator().manual_seed(0)
    A, lam = spd(6, generator), 0.5
    H, visited = torch.eye(6), torch.linalg.qr(torch.randn(6, 3, generator=generator)).Q
    for _ in range(300):
        x = visited @ torch.randn(3, generator=generator)
        s = H @ x
        assert bfgs_(H, s, A @ s + lam * s, acceptable(s, A @ s + lam * s, x))
        assert torch.linalg.eigvalsh(H).min() > 0
    inverse = torch.linalg.inv(A + lam * torch.eye(6))
    # linear convergence, 300 random directions: far below the 0.1 that I starts from
    assert ((H - inverse) @ visited).norm() < 1e-6 * inverse.norm()


def test_kronecker_acts_on_the_row_major_vec():
    P, Q, M = torch.randn(3, 3), torch.randn(4, 4), torch.randn(3, 4)
    product = Kronecker(P, Q)
    assert product.shape == (12, 12)
    torch.testing.assert_close(product @ M.reshape(-1), (P @ M @ Q.T).reshape(-1))
    torch.testing.assert_close(product @ torch.eye(12), torch.kron(P, Q))
    with pytest.raises(ValueError, match="do not fit"):
        product @ torch.ones(5)
