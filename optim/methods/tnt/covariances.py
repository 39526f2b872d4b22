"""Covariance factors U_i of TNT from averaged contractions H_i, and their damped inverses."""

from dataclasses import dataclass
from math import prod

from torch import Tensor

from ...core import axes
from ...core.stacks import Stack
from ...linalg.basics import damped_inverse

TINY = 1e-30  # a mean eigenvalue below it stands for no gradient at all


def scale(H: Tensor, shape: tuple[int, ...], k: int, i: int) -> Tensor:
    """Ratio H_i / U_i = c^(k-1) Π_{j≠i} n_j, [b]; H [b, n, n] is any one of the H_j.

    c = (tr H_i / Π n_j)^(1/k) for k axes with a matrix: every U_i has the mean eigenvalue c, and
    U_1 ⊗ ... ⊗ U_k the trace tr H_i. Source: arXiv:2106.02925, as its published code scales.

    By hand, H_1 = H_2 = 2 I of a 2 x 2 parameter, c = 1:
        >>> import torch
        >>> scale(2 * torch.eye(2)[None], (2, 2), 2, 0).tolist()
        [2.0]
    """
    N = prod(shape)
    c = (H.diagonal(dim1=-2, dim2=-1).sum(-1) / N).clamp_min(TINY) ** (1 / k)
    return c ** (k - 1) * (N / shape[i])


def share(stack: Stack, i: int) -> Tensor:
    """Ratio H_i / U_i of each parameter in a stack, [size]."""
    held = axes.names(stack, "H")
    return scale(stack[next(iter(held.values()))], stack.shape, len(held), i)


def covariance(stack: Stack, i: int) -> Tensor:
    """Covariance factor U_i [size, n_i, n_i], undamped."""
    return stack[axes.names(stack, "H")[i]] / share(stack, i)[:, None, None]


@dataclass(frozen=True)
class CovarianceInverse:
    """Damped inverse (H / share + damping I)⁻¹ from H and share damping, without a copy."""

    damping: float

    def shift(self, stack: Stack, i: int) -> Tensor:
        """Damping of H_i that corresponds to that of U_i: share damping, [size]."""
        return self.damping * share(stack, i)

    def __call__(self, H: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        """Results [b, n, n], and for which of them it worked, [b] bool."""
        inverse, ok = damped_inverse(H, damping)
        return inverse.mul_((damping / self.damping)[:, None, None]), ok
