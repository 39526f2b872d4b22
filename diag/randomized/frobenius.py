"""Frobenius norms, inner products and errors from random probes.

For signs z, E‖Cz‖² = ‖C‖² and E Cz·Bz = <C, B>. The estimators have Student-t intervals over the
probes, the metrics of a MatrixFree truth bootstrap intervals: both say what other probes would
have found, not what other examples would.
"""

import math

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, like
from ..statistics.intervals import LEVEL, bootstrap_counts
from .probes import ProbeEstimate, over_probes, probe_blocks, products, rooted, with_error

PROBES = 100


def frobenius_squared(
    operator: Operator, probes: int = 100, generator: torch.Generator | None = None
) -> ProbeEstimate:
    """‖C‖_F² as the mean of ‖Cz‖² over signs z; one product a probe. Unbiased.

    Raises: ValueError for probes < 2.
    Source: Hutchinson 1990, for the trace of CᵀC.
    """
    blocks = probe_blocks(operator, probes, generator)
    return over_probes(torch.cat([products(operator, z).square().sum(0) for z in blocks]))


def inner_estimate(
    first: Operator, second: Operator, probes: int = 100, generator: torch.Generator | None = None
) -> ProbeEstimate:
    """<C, B> = tr(CᵀB) as the mean of Cz·Bz over signs z; a product with each a probe. Unbiased.

    Raises: ValueError for probes < 2, or when the shapes differ.
    Source: Hutchinson 1990, for the trace of CᵀB.
    """
    return over_probes(_samples(first, second, probes, generator)[1])


def relative_error_estimate(
    truth: Operator,
    approximation: Operator,
    probes: int = 100,
    generator: torch.Generator | None = None,
) -> ProbeEstimate:
    """‖C - B‖_F / ‖C‖_F as the root of mean ‖(C - B)z‖² / mean ‖Cz‖² over signs z.

    A ratio estimator, biased by order 1/probes; its error is to first order that of the mean of
    (‖(C - B)z_n‖² - r ‖Cz_n‖²) / mean ‖Cz‖², r the squared ratio. A product with each a probe. NaN
    for a zero truth.

    Raises: ValueError for probes < 2, or when the shapes differ.
    Source: Cochran 1977, chapter 6 (ratio estimators).
    """
    size, _, error = _samples(truth, approximation, probes, generator)
    ratio = (error.sum() / size.sum()).item()
    if math.isnan(ratio):
        return ProbeEstimate(ratio, n=probes)
    u = (error - ratio * size) / size.mean()
    return rooted(with_error(ratio, u.std().item() / probes**0.5, probes))


def probed_error(truth: Operator, approximation: Operator) -> Estimate:
    """‖C − B‖_F / ‖C‖_F, estimated; n is the number of probes."""
    square, _, error = _replicates(truth, approximation)
    return _estimate((error / square).sqrt())


def probed_cosine(truth: Operator, approximation: Operator) -> Estimate:
    """<C, B> / (‖C‖_F ‖B‖_F), estimated; n is the number of probes."""
    square, cross, error = _replicates(truth, approximation)
    own = error - square + 2 * cross  # ‖B‖² on the same probes: an exact B = C has cosine 1
    return _estimate((cross / (square * own).sqrt()).clamp(-1, 1))


def probed_best_scale_error(truth: Operator, approximation: Operator) -> Estimate:
    """√(1 − cos²), estimated; n is the number of probes."""
    square, cross, error = _replicates(truth, approximation)
    own = error - square + 2 * cross
    left = error - (1 - cross / own) ** 2 * own  # does not cancel where B is close to C
    return _estimate((left / square).clamp(0, 1).sqrt())


def _samples(
    first: Operator, second: Operator, probes: int, generator: torch.Generator | None
) -> Tensor:
    """‖Cz‖², Cz·Bz and ‖Cz − Bz‖² of every probe, [3, probes]."""
    if tuple(first.shape) != tuple(second.shape):
        raise ValueError(f"shapes differ: {tuple(first.shape)} and {tuple(second.shape)}")
    samples, there = [], like(second).device
    for z in probe_blocks(first, probes, generator, rows=3):
        Cz = products(first, z)
        Bz = products(second, z.to(there)).to(z.device)
        samples.append(torch.stack([(Cz * Cz).sum(0), (Cz * Bz).sum(0), (Cz - Bz).square().sum(0)]))
    return torch.cat(samples, dim=1)


def _replicates(truth: Operator, approximation: Operator) -> Tensor:
    """‖C‖², <C, B> and ‖C − B‖², [3, 1 + replicates]: from all probes, then from resampled ones."""
    each = _samples(truth, approximation, PROBES, None).cpu()
    means = each @ bootstrap_counts(PROBES).T / PROBES
    return torch.cat([each.mean(1, keepdim=True), means], dim=1)


def _estimate(numbers: Tensor) -> Estimate:
    """The first number, with the quantiles of the others as interval."""
    value, drawn = numbers[0].item(), numbers[1:]
    if not math.isfinite(value):
        return Estimate(value, n=PROBES)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).to(drawn)
    low, high = torch.quantile(drawn, ends).tolist()
    return Estimate(value, min(low, value), max(high, value), PROBES)
