"""Stochastic Lanczos quadrature: spectral densities and traces of functions, matrix-free.

The spectral measure of C seen from random signs z has mean (1/d) Σ_j δ(λ_j). Lanczos steps from z
give its Gauss quadrature: nodes are the eigenvalues of the tridiagonal T, weights the squared first
entries of its eigenvectors.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import Operator, like
from .probes import ProbeEstimate, over_probes, probe_blocks, products, t_quantile

TAIL = 6  # kernel widths the grid reaches beyond the outermost node; leaves 1e-9 outside
SMOOTHING = 0.01  # default kernel width, in units of the spectrum's spread


class SpectralDensity(NamedTuple):
    """Smoothed density [m] of the eigenvalues over a grid [m], with 95 % bars low, high [m].

    The bars are pointwise Student-t intervals over the probes. kernel_width: standard deviation of
    the Gaussian of each eigenvalue.
    """

    grid: Tensor
    density: Tensor
    low: Tensor
    high: Tensor
    kernel_width: float
    probes: int
    steps: int


def spectral_density(
    operator: Operator,
    probes: int = 16,
    steps: int = 64,
    points: int = 1024,
    kernel_width: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Density of the eigenvalues, (1/d) Σ_j N(t; λ_j, kernel_width²), by Lanczos quadrature.

    It integrates to 1. Exact within its bars once the Lanczos steps resolve the kernel; fewer smear
    out the bulk. One product a probe and step. kernel_width: by default 1 % of the distance between
    the outermost nodes (of their size, where they coincide).

    Raises: ValueError for probes < 2, steps < 1, a kernel_width <= 0 or too narrow for the grid.
    Source: Ubaru, Chen and Saad 2017; Ghorbani, Krishnan and Xiao 2019 (arXiv:1901.10159).
    """
    if kernel_width is not None and not kernel_width > 0:
        raise ValueError(f"kernel_width must be positive, not {kernel_width}")
    nodes, weights = quadrature(operator, probes, steps, generator)
    first, last = nodes.min().item(), nodes.max().item()
    spread = last - first
    width = kernel_width or SMOOTHING * (spread or abs(first) or 1.0)
    reach = TAIL * width
    grid = torch.linspace(first - reach, last + reach, points).to(nodes)
    spacing = (spread + 2 * reach) / (points - 1)
    if width < spacing:
        raise ValueError(
            f"a kernel_width of {width:.3g} falls between the grid's points, {spacing:.3g} apart; "
            f"widen it or take at least {int((spread + 2 * reach) / width) + 2} points"
        )
    each = torch.stack([_smeared(*pair, grid, width) for pair in zip(nodes, weights, strict=True)])
    density, error = each.mean(0), each.std(0) / probes**0.5
    low, high = density - t_quantile(probes) * error, density + t_quantile(probes) * error
    return SpectralDensity(grid, density, low.clamp(min=0), high, width, probes, nodes.shape[1])


def _smeared(nodes: Tensor, weights: Tensor, grid: Tensor, width: float) -> Tensor:
    """Σ_k weight_k N(t; node_k, width²) on the grid, [m]."""
    z = (grid[:, None] - nodes) / width
    return (-z.square() / 2).exp() @ weights / (width * (2 * torch.pi) ** 0.5)


def spectral_sum(
    operator: Operator,
    function: Callable[[Tensor], Tensor],
    probes: int = 16,
    steps: int = 64,
    generator: torch.Generator | None = None,
) -> ProbeEstimate:
    """Trace of f(C), Σ_j f(λ_j), by stochastic Lanczos quadrature; one product a probe and step.

    function: elementwise; torch.log of Damped(C, λ) gives a log-determinant. The interval is over
    the probes; the steps are exact for polynomials of degree below 2·steps.

    Raises: ValueError for probes < 2, steps < 1, or a function not finite on the spectrum.
    Source: Ubaru, Chen and Saad 2017.

    >>> from kronscope.diag.operators import Diagonal
    >>> print(spectral_sum(Diagonal(torch.tensor([1.0, 2.0, 3.0])), torch.square))
    14 [14, 14] (n = 16)
    """
    nodes, weights = quadrature(operator, probes, steps, generator)
    values = function(nodes)
    if not values.isfinite().all():
        bad = nodes[~values.isfinite()][0].item()
        raise ValueError(
            f"the function is not finite at {bad:.3g}, an eigenvalue estimate of the operator; "
            f"damp the operator (Damped) or give a function defined on all its spectrum"
        )
    return over_probes(operator.shape[0] * (weights * values).sum(1))


def quadrature(
    operator: Operator, probes: int, steps: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Nodes and weights [probes, min(steps, d)] of the Gauss quadrature from each probe.

    Raises: ValueError for probes < 2 or steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    steps = min(steps, operator.shape[0])
    blocks = probe_blocks(operator, probes, generator, rows=steps + 1)
    nodes, vectors = torch.linalg.eigh(torch.cat([lanczos(operator, z, steps) for z in blocks]))
    return nodes, vectors[:, 0].square()


def lanczos(operator: Operator, starts: Tensor, steps: int) -> Tensor:
    """Tridiagonal QᵀCQ [k, steps, steps] from each start vector [d, k], in float64.

    Fully re-orthogonalised, twice. Where a Krylov space is exhausted early, T goes on with entries
    that the first unit vector does not reach.
    """
    q = (starts / starts.norm(dim=0)).T
    basis = q.new_zeros(len(q), steps, q.shape[1])
    T = q.new_zeros(len(q), steps, steps)
    precision, scale = torch.finfo(like(operator).dtype).eps, q.new_zeros(len(q))
    for j in range(steps):
        basis[:, j] = q
        w = products(operator, q.T).T
        T[:, j, j] = (w * q).sum(1)
        known = basis[:, : j + 1]
        for _ in range(2):
            w = w - (known.mT @ (known @ w[..., None]))[..., 0]
        beta = w.norm(dim=1)
        scale = torch.maximum(scale, T[:, j, j].abs() + beta)
        ended = beta <= 10 * precision * scale
        T[:, j, j] = torch.where(q.any(1), T[:, j, j], T[:, 0, 0])  # inside the spectrum's hull
        q = torch.where(ended[:, None], 0.0, w / beta[:, None])
        if j + 1 < steps:
            T[:, j, j + 1] = T[:, j + 1, j] = torch.where(ended, 0.0, beta)
    return T
