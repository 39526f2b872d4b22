"""Confidence intervals of a batch's metrics, by bootstrap and by first-order influence.

The interval of a batch's own number is for the number typical of batches of its size, made of the
means of ‖C‖², <C, B>² and ‖C - B‖² over all of them; the approximation is held fixed. It is not for
the population's number, which a batch's norms overestimate by their sampling noise (see the metrics
`population_*`), nor for other batches' numbers: 83 to 90 % of these lie inside an interval with
95 % for the typical value. Coverage of the typical value, simulated with GGN and Hessian blocks of
30 to 300 examples:

- `diag.statistics.bootstrap_t` (relative_error, relative_error_best_scale, cosine): 0.91 to 0.985;
- `from_replicates` (other functions of norms): 0.91 to 1, cautious near the noise floor, where
  intervals are up to √3 times wider than needed; 0.8 for empirical Fisher blocks of 30;
- `from_influence` (inverses and eigenvalues): see there;
- noise_floor: another claim, see there.

Norms and inner products of a PerExampleTerms truth with weights w are w K w and w·t, so a bootstrap
replicate costs O(N²). An example drawn twice would meet itself and bias a norm: replicates leave
every n = m pair out (a U-statistic), and their deviations from the U-statistic of the batch are put
around the batch's own value.
"""

import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import BUDGET, Kronecker, Operator, dense, inner, keep, like
from ..operators.batched import difference
from ..operators.dtypes import convert, entries_of, tensors
from ..operators.pairing import keep_pair
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.per_example import PerExampleTerms

REPLICATES = 1000
LEVEL = 0.95
CANCELLED = 1e-7  # of ‖C‖² + ‖B‖²: below it a difference of squares keeps under 9 digits
BLURRED = 1e-3  # of 1 - cos²: below it a difference of float32's squares keeps under 4 digits
Z = 1.959964  # the normal quantile of LEVEL, for first-order intervals


@lru_cache(maxsize=4)  # 8 MB each for 1,000 examples
def bootstrap_counts(n: int) -> Tensor:
    """How often each of n examples is drawn, [REPLICATES, n]; the same in every call."""
    generator = torch.Generator().manual_seed(n)
    drawn = torch.randint(n, (REPLICATES, n), generator=generator)
    counts = torch.zeros(REPLICATES, n, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(counts))


def norm_deviations(gram: Tensor) -> Tensor:
    """Deviations [REPLICATES] of ‖C‖² over bootstrap samples, from pairs of distinct examples.

    c K c - Σ c_n² K_nn over Σ_{n≠m} c_n c_m, minus the same with all c = 1. NaN for N = 1.
    """
    n = len(gram)
    counts = bootstrap_counts(n).to(gram)
    own = gram.diagonal()
    pairs = ((counts @ gram) * counts).sum(1) - counts.square() @ own
    weights = n**2 - counts.square().sum(1)
    centre = (gram.sum() - own.sum()) / (n * (n - 1)) if n > 1 else math.nan
    return pairs / weights - centre


def inner_deviations(inners: Tensor) -> Tensor:
    """Deviations [REPLICATES] of a mean of per-example inner products [N]."""
    counts = bootstrap_counts(len(inners)).to(inners)
    return counts @ inners / len(inners) - inners.mean()


def residual_square(truth: Operator, approximation: Operator, whole: float, cross: float) -> float:
    """‖C - B‖_F² from whole = ‖C‖² + ‖B‖² and cross = <C, B>, without cancellation.

    With C_n = Ḡ + dC_n and a_n a_nᵀ = Ā + dA_n the truth is Ḡ ⊗ Ā plus the covariance
    mean_n dC_n ⊗ dA_n, so that truth - G ⊗ A is that plus (Ḡ - G) ⊗ Ā + G ⊗ (Ā - A): all small
    where the approximation is good.
    """
    if isinstance(truth, KroneckerTerms) and isinstance(approximation, Kronecker):
        return _beside_product(truth, approximation)
    left = whole - 2 * cross
    if left >= CANCELLED * whole:
        return left
    # few digits left: subtract term by term, or entry by entry where these fit, instead
    if (
        isinstance(truth, KroneckerTerms)
        and isinstance(approximation, KroneckerTerms)
        and torch.equal(truth.a, approximation.a)
    ):
        rest = KroneckerTerms(truth.a, difference(truth.left, approximation.left))
        return inner(rest, rest)
    if 8 * truth.shape[0] ** 2 > BUDGET:
        grain = torch.finfo(like(truth).dtype).eps
        warnings.warn(
            f"the truth and the approximation [{truth.shape[0]:,}, {truth.shape[1]:,}] differ so "
            f"little that their relative error is known to about {grain**0.5:.0e} at best; entry "
            f"by entry they would need more than the memory budget",
            stacklevel=2,
        )
        return max(left, 0.0)
    return (dense(truth) - dense(approximation)).square().sum().item()


def _beside_product(truth: KroneckerTerms, approximation: Kronecker) -> float:
    G, A = truth.left_mean.double(), truth.right_mean.double()
    left, right = approximation.left.double(), approximation.right.double()
    first, second = Kronecker(G - left, A), Kronecker(left, A - right)
    rest = inner(first, first) + 2 * inner(first, second) + inner(second, second)
    crossed = truth.covariance_inner(first) + truth.covariance_inner(second)
    return max(truth.covariance_square() + rest + 2 * crossed, 0.0)


class Norms(NamedTuple):
    """‖C‖², <C, B> and ‖C - B‖², each [1 + REPLICATES]: the batch's own value first.

    own: ‖B‖². inners: <T_n, B> [N], float64, of a truth made of per-example terms.
    """

    square: Tensor
    cross: Tensor
    error: Tensor
    own: float
    inners: Tensor | None = None


def norms(truth: Operator, approximation: Operator) -> Norms:
    """The three numbers all Frobenius metrics are made of, with bootstrap replicates.

    A truth without per-example terms, or of one example, has its own values only, [1]. Kept with
    the truth while the approximation lives. Where float32 cannot tell the two apart but for their
    scale, they are taken from copies in float64 that fit the memory budget (4 GiB).
    """

    def compute() -> Norms:
        found = _norms(truth, approximation)
        if not _blurred(found, truth):
            return found
        double = like(truth).double()
        return _norms(convert(truth, double), convert(approximation, double))

    return keep_pair(truth, "norms", approximation, compute)


def _blurred(found: Norms, truth: Operator) -> bool:
    """Whether C is nearly a multiple of B, held in less than float64, and small enough to copy."""
    entries, held = entries_of(truth), tensors(truth)
    if entries is None or held is None or entries.dtype == torch.float64:
        return False
    whole = found.square[0].item() * found.own
    near = whole - found.cross[0].item() ** 2 < BLURRED * whole
    return near and 8 * sum(tensor.numel() for tensor in held) <= BUDGET


def _norms(truth: Operator, approximation: Operator) -> Norms:
    square = inner(truth, truth)
    inners = truth.inners(approximation).double() if isinstance(truth, PerExampleTerms) else None
    cross = inner(truth, approximation) if inners is None else inners.mean().item()
    own = inner(approximation, approximation)
    error = residual_square(truth, approximation, square + own, cross)
    values = torch.tensor([square, cross, error], dtype=torch.float64)[:, None]
    if not isinstance(truth, PerExampleTerms) or inners is None or truth.n == 1:
        return Norms(values[0], values[1], values[2], own, inners)
    d_square = deviations(truth)
    d_cross = inner_deviations(inners).cpu()
    moved = values + torch.stack([d_square, d_cross, d_square - 2 * d_cross])
    moved[[0, 2]] = moved[[0, 2]].clamp(min=0)
    square_too, cross_too, error_too = torch.cat([values, moved], dim=1)
    return Norms(square_too, cross_too, error_too, own, inners)


def deviations(truth: PerExampleTerms) -> Tensor:
    """`norm_deviations` of a truth, [REPLICATES], float64; kept with it."""
    return keep(truth, "deviations", lambda: norm_deviations(truth.gram)).double().cpu()


def from_replicates(numbers: Tensor, truth: Operator, undefined: float = math.inf) -> Estimate:
    """Estimate from [1 + REPLICATES] numbers, the value first: a percentile interval.

    undefined: what a replicate counts as whose truth has no norm left (a batch that cannot tell
    the truth from zero), the worst value of the metric. The interval is widened to hold the value.
    [1] number: no interval (NaN).
    """
    value, n = numbers[0].item(), getattr(truth, "n", 0)
    if len(numbers) == 1:
        return Estimate(value, n=n)
    tail = (1 - LEVEL) / 2
    ends = torch.tensor([tail, 1 - tail]).to(numbers)
    drawn = numbers[1:].nan_to_num(nan=undefined, posinf=math.inf, neginf=-math.inf)
    # nearest: between two infinite replicates there is nothing to interpolate
    low, high = torch.quantile(drawn, ends, interpolation="nearest").tolist()
    return Estimate(value, min(low, value), max(high, value), n)


def from_influence(
    truth: Operator,
    value: float,
    influence: Callable[[PerExampleTerms], Tensor] | None,
    least: float = -math.inf,
    greatest: float = math.inf,
    log: bool = False,
) -> Estimate:
    """First-order (infinitesimal jackknife) interval from each example's influence U_n, [N].

    The standard error is (Σ U_n²)^½ / N (Jaeckel 1972). influence: U of a truth with per-example
    terms; None where there is no derivative. No interval (NaN) then, for other truths and for one
    example. least, greatest: the metric's range, to which the interval is cut. log: symmetric in
    log(value), for ratios.
    Coverage of the number typical of batches of this size, simulated with 30 and 100 examples:
    preconditioned_condition 0.92 to 1; step_cosine 0.84 to 0.97 where λ is the mean curvature or
    more, 0.72 to 0.95 at a tenth of it, 0.55 to 0.9 for empirical Fisher blocks. The population's
    number may lie elsewhere: sampling noise biases conditions upwards, cosines towards 0.
    """
    n = getattr(truth, "n", 0)
    if (
        influence is None
        or not isinstance(truth, PerExampleTerms)
        or n < 2
        or not math.isfinite(value)
    ):
        return Estimate(value, n=n)
    error = Z * influence(truth).square().sum().sqrt().item() / n
    ends = (value - error, value + error)
    if log:
        ends = (value * math.exp(-error / value), value * math.exp(error / value))
    # an end that is NaN stays: max and min return their first argument then
    return Estimate(value, max(ends[0], least), min(ends[1], greatest), n)
