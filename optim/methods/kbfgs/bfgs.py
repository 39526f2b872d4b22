"""The BFGS formulas of K-BFGS for H [..., out, out], s, y [..., out]; nothing waits for a GPU.

Source: arXiv:2006.08877, sections 3-4, constants as in its published code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...linalg.basics import is_finite, known_true
from ...linalg.operators import CompactInverse

MU_1 = 0.2  # Powell's constant, on H
SKIP = 1e-4  # a pair with less curvature than this (times the gradient norm) is skipped
GUARD = 1e-3  # relative distance of s·y from s·s below which theta_2 is not formed


class DampedPair(NamedTuple):
    """s, y after damping; for which the two dampings fired; which pairs can be used at all.

    broken: where H is not positive definite, as far as y tells.
    """

    s: Tensor
    y: Tensor
    powell: Tensor
    second: Tensor
    valid: Tensor
    broken: Tensor


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of vectors [..., n] -> [...]."""
    return (a * b).sum(-1)


def times(H: Tensor | CompactInverse, v: Tensor) -> Tensor:
    """H v for H [..., n, n] and v [..., n]."""
    return (H @ v[..., None])[..., 0]


def broken(Hv: Tensor, v: Tensor) -> Tensor:
    """Whether vᵀ(Hv) is negative or not finite though v·v is finite; [...] bool.

    By hand, for H = -I, I and NaN:
        >>> v = torch.ones(3, 2)
        >>> broken(torch.tensor([-1.0, 1.0, torch.nan])[:, None] * v, v).tolist()
        [True, False, True]
    """
    product = dot(v, Hv)
    return is_finite(dot(v, v)) & ~((product >= 0) & is_finite(product))


def powell_on_h(s: Tensor, y: Tensor, Hy: Tensor) -> tuple[Tensor, Tensor]:
    """s̃ = θ1 s + (1 - θ1) H y with s̃·y >= mu_1 y·Hy, and whether it fired.

    Fires if s·y <= mu_1 yᵀHy, then θ1 = (1 - mu_1) yᵀHy / (yᵀHy - s·y).
    """
    sy, yHy = dot(s, y), dot(y, Hy)
    fires = sy <= MU_1 * yHy
    theta = ((1 - MU_1) * yHy / (yHy - sy))[..., None]
    return torch.where(fires[..., None], theta * s + (1 - theta) * Hy, s), fires


def second_damping(s: Tensor, y: Tensor, mu_2: float | Tensor) -> tuple[Tensor, Tensor]:
    """ỹ with s·ỹ >= mu_2 s·s, and whether it fired (Powell's damping with B = I).

    Fires if s·y <= mu_2 s·s, then ỹ = θ2 y + (1 - θ2) s, θ2 = (1 - mu_2) s·s / (s·s - s·y).
    From mu_2 >= 1 (damping >= 1) on the denominator can vanish; near there ỹ = y + c s, with c
    such that s·ỹ = mu_2 s·s, takes its place (our choice).
    """
    sy, ss = dot(s, y), dot(s, s)
    fires = sy <= mu_2 * ss
    theta = ((1 - mu_2) * ss / (ss - sy))[..., None]
    mixed = theta * y + (1 - theta) * s
    shifted = y + (mu_2 - sy / ss)[..., None] * s
    near = ((ss - sy).abs() < GUARD * ss)[..., None]
    return torch.where(fires[..., None], torch.where(near, shifted, mixed), y), fires


def double_damping(
    s: Tensor, y: Tensor, H: Tensor | CompactInverse, mu_2: float | Tensor
) -> DampedPair:
    """Powell on H, then the second damping; invalid where yᵀHy is not positive and finite.

    What fully-connected layers use.
    """
    Hy = times(H, y)
    yHy, bad = dot(y, Hy), broken(Hy, y)
    s, powell = powell_on_h(s, y, Hy)
    y, second = second_damping(s, y, mu_2)
    return DampedPair(s, y, powell, second, (yHy > 0) & is_finite(yHy), bad)


def powell_and_shift(
    s: Tensor, y: Tensor, H: Tensor | CompactInverse, mu_2: float | Tensor
) -> DampedPair:
    """Powell on H, then always ỹ = y + mu_2 s̃: s̃·ỹ >= mu_1 yᵀHy + mu_2 s̃·s̃ for any mu_2 > 0.

    What convolutions use (D_P D_LM of arXiv:2102.06737).
    """
    Hy = times(H, y)
    yHy, bad = dot(y, Hy), broken(Hy, y)
    s, powell = powell_on_h(s, y, Hy)
    return DampedPair(s, y + mu_2 * s, powell, yHy > 0, (yHy > 0) & is_finite(yHy), bad)


def acceptable(s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """The skip rule: s·y > 0 and s·y > 1e-4 ‖s‖² ‖gradient‖, all finite; [...] bool."""
    sy, ss = dot(s, y), dot(s, s)
    enough = (sy > 0) & (sy > SKIP * ss * gradient.norm(dim=-1))
    return enough & is_finite(sy) & is_finite(ss)


def bfgs_(H: Tensor, s: Tensor, y: Tensor, accept: Tensor) -> Tensor:
    """H <- H + (ρ² yᵀHy + ρ) s sᵀ - ρ (s (Hy)ᵀ + (Hy) sᵀ), ρ = 1 / s·y, in place where accept.

    Written as s wᵀ + w sᵀ, one product of rank two. After it H y = s. Refused where the new H
    would overflow: no entry of a positive definite H exceeds its largest diagonal entry.

    Returns: where the update was made, [...] bool.
    """
    Hy = times(H, y)
    rho = (1 / dot(s, y))[..., None]
    w = 0.5 * (rho.square() * dot(y, Hy)[..., None] + rho) * s - rho * Hy
    reach = 2 * s.abs().amax(-1) * w.abs().amax(-1) + H.diagonal(dim1=-2, dim2=-1).amax(-1)
    accept = accept & is_finite(reach)
    chosen = accept[..., None]
    s, w = torch.where(chosen, s, 0.0), torch.where(chosen, w, 0.0)
    add = H.addmm_ if H.ndim == 2 else H.baddbmm_
    add(torch.stack([s, w], -1), torch.stack([w, s], -2))
    return accept


def append_(H: CompactInverse, s: Tensor, y: Tensor, accept: Tensor) -> Tensor:
    """Store the pair as the newest row of H and drop the oldest, in place where accept.

    Returns: where the pair was stored, [...] bool.
    """
    accept = accept & is_finite(s).all(-1) & is_finite(y).all(-1)
    S = torch.cat([H.S[..., 1:, :], s[..., None, :]], -2)
    Y = torch.cat([H.Y[..., 1:, :], y[..., None, :]], -2)
    # R (upper triangle of S Yᵀ) and Y Yᵀ shift up-left and gain one row and column
    R, YY = torch.zeros_like(H.R), torch.zeros_like(H.YY)
    R[..., :-1, :-1], YY[..., :-1, :-1] = H.R[..., 1:, 1:], H.YY[..., 1:, 1:]
    R[..., -1] = times(S, y)
    YY[..., -1] = YY[..., -1, :] = times(Y, y)
    every = known_true(accept)
    for held, new in ((H.S, S), (H.Y, Y), (H.R, R), (H.YY, YY)):
        held.copy_(new if every else torch.where(accept[..., None, None], new, held))
    return accept
