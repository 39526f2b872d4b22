"""Frobenius metrics of a truth known by its products alone, from random probes with intervals.

For signs z, E‖Cz‖² = ‖C‖² and E <Cz, Bz> = <C, B>. All three numbers come from the same probes,
and the interval from resampling those: it says what other probes would have found, where that of a
truth with per-example terms says what other examples would.
"""

import math

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, like
from ..statistics.intervals import LEVEL, bootstrap_counts
from ..truths.matrix_free import MatrixFree
from .probes import probe_blocks, products

PROBES = 100


def probed_error(truth: MatrixFree, approximation: Operator) -> Estimate:
    """‖C − B‖_F / ‖C‖_F, estimated; n is the number of probes."""
    square, _, error = _moments(truth, approximation)
    return _estimate((error / square).sqrt())


def probed_cosine(truth: MatrixFree, approximation: Operator) -> Estimate:
    """<C, B> / (‖C‖_F ‖B‖_F), estimated; n is the number of probes."""
    square, cross, error = _moments(truth, approximation)
    own = error - square + 2 * cross  # ‖B‖² on the same probes: an exact B = C has cosine 1
    return _estimate((cross / (square * own).sqrt()).clamp(-1, 1))


def probed_best_scale_error(truth: MatrixFree, approximation: Operator) -> Estimate:
    """√(1 − cos²), estimated; n is the number of probes."""
    square, cross, error = _moments(truth, approximation)
    own = error - square + 2 * cross
    left = error - (1 - cross / own) ** 2 * own  # does not cancel where B is close to C
    return _estimate((left / square).clamp(0, 1).sqrt())


def _moments(truth: MatrixFree, approximation: Operator) -> Tensor:
    """‖C‖², <C, B> and ‖C − B‖², [3, 1 + replicates]: from all probes, then from resampled ones."""
    samples, there = [], like(approximation)
    for z in probe_blocks(truth, PROBES, None, rows=3):
        Cz = products(truth, z)
        Bz = products(approximation, z.to(there.device)).to(Cz)
        samples.append(torch.stack([(Cz * Cz).sum(0), (Cz * Bz).sum(0), (Cz - Bz).square().sum(0)]))
    each = torch.cat(samples, dim=1).cpu()  # [3, PROBES]
    means = each @ bootstrap_counts(PROBES).T / PROBES
    return torch.cat([each.mean(1, keepdim=True), means], dim=1)


def _estimate(numbers: Tensor) -> Estimate:
    """The first number, and the quantiles of the others."""
    value, drawn = numbers[0].item(), numbers[1:]
    if not math.isfinite(value):
        return Estimate(value, n=PROBES)
    ends = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2]).to(drawn)
    low, high = torch.quantile(drawn, ends).tolist()
    return Estimate(value, min(low, value), max(high, value), PROBES)
