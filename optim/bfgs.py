"""The BFGS formulas of K-BFGS: double damping, the skip rule, the dense and the stored update.

Pure tensor code without a branch on values: nothing here waits for a GPU. s, y [out] are the
averaged changes of pre-activation and of its gradient, H [out, out] the inverse Hessian held.
Source: arXiv:2006.08877, sections 3-4, constants as in its published code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from optim.linalg import all_finite
from optim.operators import CompactInverse, Operator

MU_1 = 0.2  # Powell's constant, on H
SKIP = 1e-4  # a pair with less curvature than this (times the gradient norm) is skipped
GUARD = 1e-3  # relative distance of s·y from s·s below which theta_2 is not formed


class DampedPair(NamedTuple):
    """s, y after double damping; which of the two fired; whether the pair can be used at all."""

    s: Tensor
    y: Tensor
    powell: Tensor
    second: Tensor
    valid: Tensor


def powell_on_h(s: Tensor, y: Tensor, Hy: Tensor) -> tuple[Tensor, Tensor]:
    """s̃ = θ1 s + (1 - θ1) H y with s̃·y >= mu_1 y·Hy, and whether it fired.

    Fires if s·y <= mu_1 yᵀHy, then θ1 = (1 - mu_1) yᵀHy / (yᵀHy - s·y).
    """
    sy, yHy = s @ y, y @ Hy
    fires = sy <= MU_1 * yHy
    theta = (1 - MU_1) * yHy / (yHy - sy)
    return torch.where(fires, theta * s + (1 - theta) * Hy, s), fires


def second_damping(s: Tensor, y: Tensor, mu_2: float) -> tuple[Tensor, Tensor]:
    """ỹ with s·ỹ >= mu_2 s·s, and whether it fired (Powell's damping with B = I).

    Fires if s·y <= mu_2 s·s, then ỹ = θ2 y + (1 - θ2) s, θ2 = (1 - mu_2) s·s / (s·s - s·y).
    From mu_2 >= 1 (damping >= 1) on the denominator can vanish; near there ỹ = y + c s, with c
    such that s·ỹ = mu_2 s·s, takes its place (our choice).
    """
    sy, ss = s @ y, s @ s
    fires = sy <= mu_2 * ss
    theta = (1 - mu_2) * ss / (ss - sy)
    mixed = theta * y + (1 - theta) * s
    shifted = y + (mu_2 - sy / ss) * s
    near = (ss - sy).abs() < GUARD * ss
    return torch.where(fires, torch.where(near, shifted, mixed), y), fires


def double_damping(s: Tensor, y: Tensor, H: Operator, mu_2: float) -> DampedPair:
    """Powell on H, then the second damping; invalid where yᵀHy is not positive and finite."""
    Hy = H @ y
    yHy = y @ Hy
    s, powell = powell_on_h(s, y, Hy)
    y, second = second_damping(s, y, mu_2)
    return DampedPair(s, y, powell, second, (yHy > 0) & torch.isfinite(yHy))


def acceptable(s: Tensor, y: Tensor, gradient: Tensor) -> Tensor:
    """The skip rule: s·y > 0 and s·y > 1e-4 ‖s‖² ‖gradient‖, all finite (0-d bool tensor)."""
    sy, ss = s @ y, s @ s
    enough = (sy > 0) & (sy > SKIP * ss * gradient.norm())
    return enough & torch.isfinite(sy) & torch.isfinite(ss)


def bfgs_(H: Tensor, s: Tensor, y: Tensor, accept: Tensor) -> Tensor:
    """H <- H + (ρ² yᵀHy + ρ) s sᵀ - ρ (s (Hy)ᵀ + (Hy) sᵀ), ρ = 1 / s·y, in place where accept.

    Written as s wᵀ + w sᵀ, one product of rank two. After it H y = s. Refused where the new H
    would overflow: no entry of a positive definite H exceeds its largest diagonal entry.

    Returns: whether the update was made, 0-d bool tensor.
    """
    Hy = H @ y
    rho = 1 / (s @ y)
    w = 0.5 * (rho.square() * (y @ Hy) + rho) * s - rho * Hy
    reach = 2 * s.abs().max() * w.abs().max() + H.diagonal().max()
    accept = accept & torch.isfinite(reach)
    s, w = torch.where(accept, s, 0.0), torch.where(accept, w, 0.0)
    H.addmm_(torch.stack([s, w], 1), torch.stack([w, s]))
    return accept


def append_(H: CompactInverse, s: Tensor, y: Tensor, accept: Tensor) -> Tensor:
    """Store the pair as the newest row of H and drop the oldest, in place where accept.

    R (upper triangle of S Yᵀ) and Y Yᵀ shift up-left and gain one row and column.

    Returns: whether the pair was stored, 0-d bool tensor.
    """
    accept = accept & all_finite(s) & all_finite(y)
    S, Y = torch.cat([H.S[1:], s[None]]), torch.cat([H.Y[1:], y[None]])
    R, YY = torch.zeros_like(H.R), torch.zeros_like(H.YY)
    R[:-1, :-1], YY[:-1, :-1] = H.R[1:, 1:], H.YY[1:, 1:]
    R[:, -1] = S @ y
    YY[:, -1] = YY[-1, :] = Y @ y
    for held, new in ((H.S, S), (H.Y, Y), (H.R, R), (H.YY, YY)):
        held.copy_(torch.where(accept, new, held))
    return accept
