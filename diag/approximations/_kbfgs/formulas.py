"""Formulas of K-BFGS: dampings of a pair (s, y), the skip rule, the BFGS update.

s, y [k] are a change and the change of gradient that follows, H [k, k] the inverse Hessian held.
Source: Goldfarb, Ren and Bahamou 2020 (arXiv:2006.08877); constants as in its published code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

MU_1 = 0.2  # of the first damping
SKIP = 1e-4  # curvature s·y per ‖s‖² and gradient norm below which a pair is skipped
NEAR = 1e-3  # of s·s: closer to s·y than this, θ_2 is not formed


class DampedPair(NamedTuple):
    """A damped pair, and which of the two dampings changed it."""

    s: Tensor
    y: Tensor
    first: bool
    second: bool


def damp_first(s: Tensor, y: Tensor, H: Tensor) -> tuple[Tensor, bool]:
    """Powell's damping on H: s <- θ s + (1 - θ) H y where s·y <= μ_1 yᵀHy; whether it fired.

    θ = (1 - μ_1) yᵀHy / (yᵀHy - s·y), after which s·y = μ_1 yᵀHy. Needs yᵀHy > 0.
    """
    Hy = H @ y
    curved, sy = y @ Hy, s @ y
    if sy > MU_1 * curved:
        return s, False
    theta = (1 - MU_1) * curved / (curved - sy)
    return theta * s + (1 - theta) * Hy, True


def damp_second(s: Tensor, y: Tensor, mu: float) -> tuple[Tensor, bool]:
    """Powell's damping with B = I: y <- θ y + (1 - θ) s where s·y <= μ s·s; whether it fired.

    θ = (1 - μ) s·s / (s·s - s·y), after which s·y = μ s·s. For μ >= 1 the denominator can vanish;
    near there y moves along s alone, to the same s·y (a choice of ours).
    """
    ss, sy = s @ s, s @ y
    if sy > mu * ss:
        return y, False
    if (ss - sy).abs() < NEAR * ss:
        return y + (mu - sy / ss) * s, True
    theta = (1 - mu) * ss / (ss - sy)
    return theta * y + (1 - theta) * s, True


def damp_twice(s: Tensor, y: Tensor, H: Tensor, mu: float) -> DampedPair | None:
    """Double damping: the first, then the second; None where yᵀHy is not positive and finite."""
    if not _usable(y @ H @ y):
        return None
    s, first = damp_first(s, y, H)
    y, second = damp_second(s, y, mu)
    return DampedPair(s, y, first, second)


def damp_always(s: Tensor, y: Tensor, H: Tensor, mu: float) -> DampedPair | None:
    """The first damping, then y <- y + μ s always, so that s·y >= μ_1 yᵀHy + μ s·s for any μ.

    For convolutions (arXiv:2102.06737). None where yᵀHy is not positive and finite.
    """
    if not _usable(y @ H @ y):
        return None
    s, first = damp_first(s, y, H)
    return DampedPair(s, y + mu * s, first, True)


def updated(H: Tensor, s: Tensor, y: Tensor, gradient: Tensor) -> Tensor | None:
    """The BFGS update H' of H, with H' y = s; None where the skip rule refuses the pair.

    H' = H + (ρ² yᵀHy + ρ) s sᵀ - ρ (s (Hy)ᵀ + (Hy) sᵀ), ρ = 1 / s·y. Refused: s·y not above
    1e-4 ‖s‖² ‖gradient‖ (and so not above 0), or an H' that is not finite.

    In one dimension H' = s / y:
        >>> from torch import eye, tensor
        >>> updated(eye(1), tensor([2.0]), tensor([4.0]), gradient=tensor([1.0])).tolist()
        [[0.5]]
    """
    sy = s @ y
    if not (_usable(sy) and sy > SKIP * (s @ s) * gradient.norm()):
        return None
    Hy, rho = H @ y, 1 / sy
    half = torch.outer(s, 0.5 * (rho.square() * (y @ Hy) + rho) * s - rho * Hy)
    new = H + (half + half.T)
    return new if torch.isfinite(new).all() else None


def _usable(curvature: Tensor) -> bool:
    return bool(curvature > 0) and bool(torch.isfinite(curvature))
