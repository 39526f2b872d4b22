"""Traces and diagonals of any operator from random probes: Hutchinson, Hutch++, XTrace.

`probes` is the number of random vectors behind the interval; generator None is one seeded 0.
Compare methods at equal products with the operator, not at equal probes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import Operator, like
from .probes import (
    ProbeEstimate,
    check_probes,
    gaussian,
    over_probes,
    probe_blocks,
    products,
    rademacher,
    seeded,
    with_error,
)


class DiagonalEstimate(NamedTuple):
    """Estimated entries [d], the standard error of each [d], and the number of probes."""

    value: Tensor
    standard_error: Tensor
    n: int


def hutchinson_trace(
    operator: Operator, probes: int = 100, generator: torch.Generator | None = None
) -> ProbeEstimate:
    """Trace as the mean of z·Cz over signs z; one product a probe.

    Unbiased, of variance 2 (‖C‖_F² - Σ_j C_jj²) a probe.

    Raises: ValueError for probes < 2.
    Source: Hutchinson 1990.

    >>> from kronscope.diag.operators import Diagonal
    >>> hutchinson_trace(Diagonal(torch.tensor([1.0, 2.0])), probes=2).value
    3.0
    """
    blocks = probe_blocks(operator, probes, generator)
    return over_probes(torch.cat([(z * products(operator, z)).sum(0) for z in blocks]))


def hutch_pp_trace(
    operator: Operator, probes: int = 30, generator: torch.Generator | None = None
) -> ProbeEstimate:
    """Trace by Hutch++: exact on a sketched range, Hutchinson on the rest; 3 products a probe.

    tr(QᵀCQ) + mean of g·(I - QQᵀ)C(I - QQᵀ)g, Q an orthonormal basis of CS; S and g [d, probes]
    are signs. Unbiased; exact where rank(C) <= probes. Interval: over the probes g, given Q.

    Raises: ValueError for probes < 2.
    Source: Meyer, Musco, Musco and Woodruff 2021 (arXiv:2010.09649), algorithm 1.
    """
    check_probes(probes)
    generator, d, device = seeded(generator), operator.shape[0], like(operator).device
    Q = _svd_of_tall(products(operator, rademacher(d, probes, generator).to(device)))[0]
    g = rademacher(d, probes, generator).to(device)
    g = g - Q @ (Q.T @ g)
    known = (Q * products(operator, Q)).sum().item()
    rest = over_probes((g * products(operator, g)).sum(0))
    return with_error(known + rest.value, rest.standard_error, probes)


def xtrace(
    operator: Operator, probes: int = 40, generator: torch.Generator | None = None
) -> ProbeEstimate:
    """Trace by XTrace, in which every probe serves the sketch and the rest; 2 products a probe.

    Mean over i of tr(Q_iᵀCQ_i) + μ_i·Cμ_i: Q_i an orthonormal basis of C times all probes but ω_i,
    μ_i = (I - Q_iQ_iᵀ)ω_i scaled to its expected length. Unbiased; exact where rank(C) < probes.
    The summands are dependent, so the interval is narrow: coverage 85 to 92 % in simulations.

    Raises: ValueError for probes < 2.
    Source: Epperly, Tropp and Webber 2024 (arXiv:2301.07825).
    """
    check_probes(probes)
    d, device = operator.shape[0], like(operator).device
    omega = gaussian(d, probes, seeded(generator)).to(device)
    Y = products(operator, omega)
    Q, sizes, V = _svd_of_tall(Y)
    Z = products(operator, Q)
    if len(sizes) < probes:  # the range of C, whole: leaving a probe out would leave it whole too
        return with_error((Q * Z).sum().item(), 0.0, probes)
    removed = V / sizes[:, None]
    return over_probes(_left_out(Z, Q, removed / removed.norm(dim=0), omega, Y))


def _svd_of_tall(Y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of Y [d, k] = Q diag(sizes) V without zeros to rounding, of one column at least."""
    Q, R = torch.linalg.qr(Y)
    left, sizes, V = torch.linalg.svd(R, full_matrices=False)
    rank = max(int((sizes > sizes[0] * Y.shape[1] * torch.finfo(Y.dtype).eps).sum()), 1)
    return Q @ left[:, :rank], sizes[:rank], V[:rank]


def _left_out(Z: Tensor, Q: Tensor, S: Tensor, omega: Tensor, Y: Tensor) -> Tensor:
    """Estimates with each probe left out of the sketch, [k]; CΩ = Y = QR and Z = CQ, [d, k].

    Q_iQ_iᵀ = Q(I - s_i s_iᵀ)Qᵀ with the unit vector s_i, column of S [k, k], orthogonal to all
    columns of R but the i-th, and μ_i = ω_i - Q x_i with x_i = (I - s_i s_iᵀ)Qᵀω_i.
    """
    d, k = Q.shape
    H = Q.T @ Z
    W = Q.T @ omega
    X = W - S * (S * W).sum(0)
    sketched = H.trace() - (S * (H @ S)).sum(0)
    cross = ((Z.T @ omega) * X).sum(0)
    rest = (omega * Y).sum(0) - 2 * cross + (X * (H @ X)).sum(0)
    lengths = omega.square().sum(0) - X.square().sum(0)  # of the μ_i, squared
    return sketched + rest * (d - k + 1) / lengths


def hutchinson_diagonal(
    operator: Operator, probes: int = 100, generator: torch.Generator | None = None
) -> DiagonalEstimate:
    """Diagonal [d] as the mean of z ∘ Cz over signs z, with standard errors; one product a probe.

    Unbiased, of variance Σ_{i≠j} C_ji² in entry j a probe.

    Raises: ValueError for probes < 2.
    Source: Bekas, Kokiopoulou and Saad 2007.
    """
    sums = None
    for z in probe_blocks(operator, probes, generator, rows=2):
        samples = z * products(operator, z)
        if sums is None:  # sums of deviations from one sample do not cancel as plain ones do
            first, sums = samples[:, :1], torch.zeros_like(samples[:, :2])
        samples = samples - first
        sums = sums + torch.stack([samples.sum(1), samples.square().sum(1)], dim=1)
    assert sums is not None
    total, squares = sums.T
    mean = total / probes
    variance = (squares - probes * mean.square()).clamp(min=0) / (probes - 1)
    return DiagonalEstimate(first[:, 0] + mean, (variance / probes).sqrt(), probes)
