"""Norm, relative error and cosine, of the population or of the batch, from moments.

Unbiased moments give estimates of the block over all examples there are; the batch's own give those
of the batch, with intervals for what is typical of batches of this size. Coverage of both is
measured in tests/diag/statistics/test_coverage.py.
"""

import math

import torch

from ..estimate import Estimate
from ..operators import Operator
from ..truths.per_example import PerExampleTerms
from .bootstrap_t import ROUNDING, Smooth, quantiles, ratio_interval
from .moments import (
    LEAST,
    Moments,
    check_terms,
    noise,
    unbiased_moments,
    unbiased_square,
    unbiased_squares,
)

NEAR = 0.9  # squared cosine above which 1 - cos² would cancel


def norm_estimate(truth: PerExampleTerms) -> Estimate:
    """Norm √max(U, 0), its interval on the scale of log(U + 2 S²), S² the squared sampling noise.

    U + S² is the batch's own ‖C‖², so that U + 2 S² is positive also where U is not.
    """
    square, extra = unbiased_square(truth), 2 * noise(truth)
    value = _root(square.values[0].item())
    if truth.n < LEAST:
        return Estimate(value, n=truth.n)
    shifted = square.values.cpu() + extra
    if not shifted[0] > 0:  # nor is any term
        return Estimate(value, value, value, truth.n)
    errors = square.variance.cpu().clamp(min=0).sqrt() / shifted
    least, greatest = quantiles((shifted / shifted[0]).log(), errors, ROUNDING)
    whole, error = shifted[0].item(), errors[0].item()
    low, high = (_root(whole * _exp(-z * error) - extra) for z in (greatest, least))
    return _holding(value, low, high, truth.n)


def error_estimate(found: Moments) -> Estimate:
    """Relative error ‖C - B‖ / ‖C‖; ∞ where only ‖C‖² is not positive, NaN where neither is."""
    value = (found.error[0].clamp(min=0) / found.square[0].clamp(min=0)).sqrt().item()
    if len(found.square) == 1:
        return Estimate(value, n=found.n)
    one = torch.ones_like(found.square)
    top, bottom = Smooth(found.error, one, -2 * one), Smooth(found.square, one, 0 * one)
    low, high = ratio_interval(top, bottom, found.spread)
    return _holding(value, _root(low), _root(high), found.n)


def cosine_estimate(found: Moments) -> Estimate:
    """Cosine <C, B> / (‖C‖ ‖B‖) of the batch; NaN for a zero truth.

    The interval is that of cos·|cos|, a ratio of smooth functions of the moments.
    """
    cross, bottom = found.cross, found.own * found.square
    value = (cross[0] / bottom[0].sqrt()).clamp(-1, 1).item()
    if len(cross) == 1:
        return Estimate(value, n=found.n)
    if (ends := _near_orthogonal(found)) is None:
        zero = torch.zeros_like(cross)
        top = Smooth(cross * cross.abs(), zero, 2 * cross.abs())
        squares = ratio_interval(top, Smooth(bottom, zero + found.own, zero), found.spread)
        ends = [math.copysign(min(_root(abs(end)), 1.0), end) for end in squares]
    return _holding(value, ends[0], ends[1], found.n)


def unbiased_cosine_estimate(truth: Operator, approximation: Operator, asked_by: str) -> Estimate:
    """Cosine ±√(<E C, B>² / (‖E C‖² ‖B‖²)) from unbiased squares, with the sign of <C, B>.

    Cut to [-1, 1], 0 where the first square is negative, NaN where the second is not positive. The
    interval is that of cos².
    """
    moments = unbiased_moments(truth, approximation, asked_by)
    squares = unbiased_squares(check_terms(truth, asked_by), approximation)
    own, n = moments.own, moments.n
    sign = math.copysign(1.0, moments.cross[0].item())
    value = math.nan
    if squares.square[0] * own > 0:
        value = sign * min(_root((squares.cross[0] / squares.square[0]).item() / own), 1.0)
    if n < LEAST:
        return Estimate(value, n=n)
    if (ends := _near_orthogonal(moments)) is None:
        one, zero = torch.ones_like(squares.cross), torch.zeros_like(squares.cross)
        top, bottom = (
            Smooth(squares.cross, one, zero),
            Smooth(own * squares.square, zero, own * one),
        )
        found = ratio_interval(top, bottom, squares.spread)
        ends = sorted(sign * min(_root(end), 1.0) for end in found)
    return _holding(value, ends[0], ends[1], n)


def _near_orthogonal(found: Moments) -> list[float] | None:
    """Ends for the cosine where the sign of <C, B> is unknown: those of <C, B> over least ‖C‖ ‖B‖.

    There a square of <C, B> has no first-order variance. None where the sign is known.
    """
    one, zero = torch.ones_like(found.cross), torch.zeros_like(found.cross)
    alone = Smooth(one, zero, zero)
    low, high = ratio_interval(Smooth(found.cross, zero, one), alone, found.spread)
    if not low <= 0 <= high:
        return None
    least = ratio_interval(Smooth(found.square, one, zero), alone, found.spread)[0]
    size = _root(least * found.own)
    return [
        max(min(end / size, 1.0), -1.0) if size else math.copysign(1.0, end) for end in (low, high)
    ]


def best_scale_estimate(found: Moments) -> Estimate:
    """Error at the best scale min_c ‖C - c B‖ / ‖C‖ = ((‖C‖² ‖B‖² - <C, B>²) / (‖C‖² ‖B‖²))^½.

    For a cosine near 1 the numerator is taken from ‖C - B‖², to which it is close where B is.
    """
    cross, own = found.cross, found.own
    bottom = own * found.square
    near = cross[0] ** 2 > NEAR * bottom[0]
    top = own * found.error - (own - cross).square() if near else bottom - cross.square()
    value = (top[0] / bottom[0]).clamp(0, 1).sqrt().item()
    if len(cross) == 1:
        return Estimate(value, n=found.n)
    if (ends := _near_orthogonal(found)) is not None:
        return _holding(value, _root(1 - max(end**2 for end in ends)), 1.0, found.n)
    zero = torch.zeros_like(cross)
    low, high = ratio_interval(
        Smooth(top, zero + own, -2 * cross),
        Smooth(bottom, zero + own, zero),
        found.spread,
    )
    return _holding(value, min(_root(low), 1.0), min(_root(high), 1.0), found.n)


def _root(square: float) -> float:
    return math.sqrt(max(square, 0.0))


def _exp(power: float) -> float:
    return math.exp(power) if power < 700 else math.inf  # where doubles end


def _holding(value: float, low: float, high: float, n: int) -> Estimate:
    """Estimate with its interval widened to hold the value."""
    return Estimate(value, min(low, value), max(high, value), n)
