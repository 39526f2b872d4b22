"""Bootstrap-t intervals for ratios of moments (Efron and Tibshirani 1993, section 12.5).

Every bootstrap sample has its own standard error, from the influence of its examples, and gives
the quantiles of the studentised deviation. Percentiles of the moments themselves would be up to √3
times too wide where a U-statistic is nearly degenerate (an approximation close to the truth), and
too short for heavy tails. For a ratio the test is inverted (Fieller 1954).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import LEVEL

ROUNDING = 1e-15  # relative, of a squared norm in float64


class Variances(NamedTuple):
    """Variances of two moments and their covariance, [1 + REPLICATES] each."""

    first: Tensor
    covariance: Tensor
    second: Tensor


class Smooth(NamedTuple):
    """A smooth function of two moments: values and both derivatives, [1 + REPLICATES] each."""

    values: Tensor
    by_first: Tensor
    by_second: Tensor


def ratio_interval(top: Smooth, bottom: Smooth, spread: Variances) -> tuple[float, float]:
    """95 % interval of E top / E bottom: every ρ at which top - ρ·bottom may be zero.

    Fieller's interval with bootstrap quantiles of this gap, in its own standard errors at the
    batch's ratio, for those of Student's t. An end is infinite where bottom may be zero.
    """
    if not bottom.values[0] > 0:
        return -math.inf, math.inf
    pairs = ((top, top), (top, bottom), (bottom, bottom))
    tt, tb, bb = (_covariance(*pair, spread) for pair in pairs)
    ratio = top.values[0] / bottom.values[0]
    errors = (tt - 2 * ratio * tb + ratio**2 * bb).clamp(min=0).sqrt()
    gap = top.values - ratio * bottom.values
    own = [numbers[0].item() for numbers in (top.values, bottom.values, tt, tb, bb)]
    least, greatest = quantiles(gap, errors, ROUNDING * (abs(own[0]) + own[1]))
    return _end(own, greatest, -1), _end(own, least, 1)


def quantiles(values: Tensor, errors: Tensor, rounding: float) -> tuple[float, float]:
    """2.5 % and 97.5 % quantiles of (replicate - batch's own value) / replicate's standard error.

    values and errors: [1 + REPLICATES], the batch's own first. rounding: least standard error. A
    replicate that is NaN (it drew one example only) widens the interval at both ends.
    """
    moved = values[1:] - values[0]
    z = torch.where(moved == 0, 0.0, moved / errors[1:].clamp(min=rounding))
    ordered, unknown = z.sort().values, int(z.isnan().sum())  # NaN comes last
    tail = (1 - LEVEL) / 2 * (len(z) - 1)
    first, last = round(tail) - unknown, round(len(z) - 1 - tail)
    low = ordered[first].item() if first >= 0 else -math.inf
    return low, ordered[last].item() if last < len(z) - unknown else math.inf


def _covariance(first: Smooth, second: Smooth, spread: Variances) -> Tensor:
    """Covariance of two functions of the moments, to first order."""
    crossed = first.by_first * second.by_second + first.by_second * second.by_first
    return (
        first.by_first * second.by_first * spread.first
        + crossed * spread.covariance
        + first.by_second * second.by_second * spread.second
    )


def _end(own: list[float], z: float, side: int) -> float:
    """End of the interval on `side`: the ρ with top - ρ·bottom = z standard errors.

    A root of (top - ρ·bottom)² = z² (tt - 2ρ·tb + ρ²·bb); the discriminant keeps its digits where z
    or the errors are small.
    """
    top, bottom, tt, tb, bb = own
    lead = bottom**2 - z * z * bb
    if not lead > 0:  # nor for an infinite z
        return side * math.inf
    ratio = top / bottom
    square = max(tt - 2 * ratio * tb + ratio**2 * bb, 0.0)
    root = abs(z) * math.sqrt(max(bottom**2 * square - z * z * (tt * bb - tb**2), 0.0))
    away = side if z * side <= 0 else -side
    return (top * bottom - z * z * tb + away * root) / lead
