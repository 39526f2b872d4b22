"""The formulas of K-BFGS's updates: what each damping guarantees, BFGS itself, the skip rule."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kronscope.diag.approximations._kbfgs.formulas import (
    MU_1,
    damp_always,
    damp_first,
    damp_second,
    damp_twice,
    updated,
)

MU_2 = st.sampled_from([0.1, 0.55, 1.0, 1.73])
SEEDS = st.integers(0, 10_000)


def spd(k, generator):
    root = torch.randn(k, k, generator=generator)
    whole = root @ root.T + 0.1 * torch.eye(k)
    return (whole + whole.T) / 2  # exactly symmetric, which a product is up to rounding


def drawn(seed, k):
    """A pair of any curvature, negative included, and an inverse Hessian."""
    generator = torch.Generator().manual_seed(seed)
    s, y = torch.randn(2, k, generator=generator)
    return s, y, spd(k, generator)


@given(seed=SEEDS, k=st.integers(1, 6), mu=MU_2)
@settings(max_examples=60, deadline=None)
def test_both_dampings_give_their_inequality(seed, k, mu):
    s, y, H = drawn(seed, k)
    floor = MU_1 * y @ H @ y
    damped, fired = damp_first(s, y, H)
    slack = 1e-9 * (1 + floor)  # rounding of products of entries of order ten
    assert damped @ y >= floor - slack
    assert fired == bool(s @ y <= floor)
    assert fired or torch.equal(damped, s)
    bent, second = damp_second(s, y, mu)
    assert s @ bent >= mu * s @ s - 1e-9 * (1 + s @ s)
    assert second == bool(s @ y <= mu * s @ s)
    assert second or torch.equal(bent, y)
    pair = damp_twice(s, y, H, mu)
    assert pair.s @ pair.y >= mu * pair.s @ pair.s - 1e-9 * (1 + pair.s @ pair.s)
    always = damp_always(s, y, H, mu)
    assert always.s @ always.y >= floor + mu * always.s @ always.s - slack
    assert always.second


def test_the_second_damping_survives_a_vanishing_denominator():
    """At s·s = s·y no θ_2 exists; with μ_2 >= 1 the damping fires there."""
    s, across = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    for nearly in (0.0, 1e-12, -1e-5):
        y, fired = damp_second(s, (1 + nearly) * s + across, 1.5)
        assert fired
        torch.testing.assert_close(s @ y, 1.5 * s @ s)
        torch.testing.assert_close(y - (y @ s) / (s @ s) * s, across)


def test_no_pair_where_the_gradient_did_not_change():
    s, zero = torch.ones(3), torch.zeros(3)
    assert damp_twice(s, zero, torch.eye(3), 0.5) is None
    assert damp_always(s, zero, torch.eye(3), 0.5) is None
    assert damp_twice(s, torch.full((3,), torch.nan), torch.eye(3), 0.5) is None


@given(seed=SEEDS, k=st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_the_update_is_bfgs(seed, k):
    """(I - ρ s yᵀ) H (I - ρ y sᵀ) + ρ s sᵀ, with H' y = s and H' positive definite."""
    s, y, H = drawn(seed, k)
    y = y if s @ y > 0 else -y
    rho = 1 / (s @ y)
    turn = torch.eye(k) - rho * torch.outer(s, y)
    expected = turn @ H @ turn.T + rho * torch.outer(s, s)
    new = updated(H, s, y, torch.zeros(k))
    scale = expected.abs().max().item()  # nearly orthogonal pairs give large matrices
    torch.testing.assert_close(new, expected, rtol=0, atol=1e-10 * scale * (1 + rho.item()))
    torch.testing.assert_close(new @ y, s, rtol=0, atol=1e-9 * scale * y.norm().item())
    assert torch.equal(new, new.T)


def test_the_skip_rule():
    s, y, H = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 3.0]), torch.eye(2)
    assert updated(H, s, y, 0.9e4 * s) is not None  # s·y = 1 > 1e-4 · 1 · 9000
    assert updated(H, s, y, 1.1e4 * s) is None
    assert updated(H, s, -y, torch.zeros(2)) is None
    assert updated(H, s, torch.tensor([0.0, 3.0]), torch.zeros(2)) is None
    assert updated(H, 1e100 * s, 1e-250 * y, torch.zeros(2)) is None  # H' would overflow
