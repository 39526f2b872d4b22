"""Moments ‖C‖², <C, B>, ‖C - B‖² of per-example terms: unbiased, the batch's, and replicates.

For N independent examples with terms T_n, Gram matrix K and t_n = <T_n, B>

    U = Σ_{n≠m} K_nm / (N (N - 1)),    t̄ = (1/N) Σ_n t_n,    U - 2 t̄ + ‖B‖²

have the expectations ‖E C‖², <E C, B> and ‖E C - B‖²: U-statistics (Hoeffding 1948), for a B that
does not depend on the batch. The batch's own ‖C‖² = 1ᵀK1/N² counts the pairs n = m too; it and
‖C - B‖² exceed the unbiased ones by the squared sampling noise, (mean K_nn - U)/N. Bootstrap
replicates re-weight pairs of distinct examples and carry their own variances, for `bootstrap_t`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import Operator, keep
from ..operators.pairing import keep_pair
from ..truths.per_example import PerExampleTerms
from .bootstrap_t import Variances
from .intervals import bootstrap_counts, norms

LEAST = 3  # examples for replicates: the influences of two are equal, and show no spread


class Replicated(NamedTuple):
    """A statistic in the batch and its R bootstrap samples, [1 + R], and its variance in each.

    slopes [1 + R, N]: slopes @ t is the covariance of the statistic with the mean of any t [N].
    """

    values: Tensor
    variance: Tensor
    slopes: Tensor


class Moments(NamedTuple):
    """‖C‖², <C, B> and ‖C - B‖² in the batch and its bootstrap samples, [1 + R] each.

    spread: variances of the first two. own: ‖B‖². n: examples. [1] each, the batch alone, for a
    truth without per-example terms or of fewer than 3 examples.
    """

    square: Tensor
    cross: Tensor
    error: Tensor
    spread: Variances
    own: float
    n: int


class Squares(NamedTuple):
    """<E C, B>² and ‖E C‖², unbiased, in the batch and its bootstrap samples, and their spread."""

    cross: Tensor
    square: Tensor
    spread: Variances


def unbiased_moments(truth: Operator, approximation: Operator, asked_by: str) -> Moments:
    """Unbiased ‖E C‖², <E C, B> and ‖E C - B‖²; a square may be negative. Kept per pair.

    Raises: ValueError naming `asked_by` for a truth without per-example terms or with only one.
    """
    terms = check_terms(truth, asked_by)

    def compute() -> Moments:
        return _moments(terms, approximation, unbiased_square(terms), noise(terms))

    return keep_pair(terms, "unbiased moments", approximation, compute)


def unbiased_squares(truth: PerExampleTerms, approximation: Operator) -> Squares:
    """<E C, B>² as Σ_{n≠m} t_n t_m / (N (N - 1)), beside ‖E C‖² and with their variances."""
    square, n = unbiased_square(truth), truth.n
    inners = norms(truth, approximation).inners
    assert inners is not None
    counts = _counts(n).to(inners)
    met = (counts @ inners)[:, None] * inners
    values, influence = _over_pairs(met, inners.square(), counts)
    variance = (counts * influence.square()).sum(1) / (n * (n - 1))
    covariance = (square.slopes * influence).sum(1)
    spread = (numbers.cpu() for numbers in (variance, covariance, square.variance))
    return Squares(values.cpu(), square.values.cpu(), Variances(*spread))


def batch_moments(truth: Operator, approximation: Operator) -> Moments:
    """‖C‖², <C, B> and ‖C - B‖² of the batch, typical of batches of this size. Kept per pair."""

    def compute() -> Moments:
        if isinstance(truth, PerExampleTerms) and truth.n > 1:
            return _moments(truth, approximation, batch_square(truth), 0.0)
        own = norms(truth, approximation)
        nothing = Variances(*torch.full((3, 1), torch.nan, dtype=torch.float64))
        n = getattr(truth, "n", 0)
        return Moments(own.square[:1], own.cross[:1], own.error[:1], nothing, own.own, n)

    return keep_pair(truth, "batch moments", approximation, compute)


def pooled(parts: list[Moments]) -> Moments:
    """Mean of the moments of independent batches, each with an approximation of its own.

    Replicates are shifted against each other: batches of one size are resampled by the same counts.
    """

    def mean(values: tuple[Tensor, ...]) -> Tensor:
        shifted = [torch.cat([v[:1], v[1:].roll(k)]) for k, v in enumerate(values)]
        return torch.stack(shifted).mean(0)

    square, cross, error = (mean(found) for found in zip(*(p[:3] for p in parts), strict=True))
    spreads = zip(*(p.spread for p in parts), strict=True)
    spread = Variances(*(mean(found) / len(parts) for found in spreads))
    own = sum(p.own for p in parts) / len(parts)
    return Moments(square, cross, error, spread, own, sum(p.n for p in parts))


def check_terms(truth: Operator, asked_by: str) -> PerExampleTerms:
    """The truth. Raises: ValueError naming `asked_by` where it has no terms, or only one."""
    if not isinstance(truth, PerExampleTerms) or truth.n < 2:
        raise ValueError(
            f"{asked_by} estimates the population's and needs a truth with per-example terms of at "
            f"least 2 examples, not a {type(truth).__name__} of {getattr(truth, 'n', 0)}; use a "
            f"GGN or Fisher block, or the Hessian of a Linear layer with one row per example"
        )
    return truth


def noise(truth: PerExampleTerms) -> float:
    """Squared sampling noise E‖C - E C‖², unbiased: (mean K_nn - U)/N."""
    gram = truth.gram.double()
    return max((gram.diagonal().mean() - gram.mean()).item(), 0.0) / (truth.n - 1)


def unbiased_square(truth: PerExampleTerms) -> Replicated:
    """U, with variances by the jackknife of U-statistics (Arvesen 1969); kept with the truth."""

    def compute() -> Replicated:
        gram, n = truth.gram.double(), truth.n
        counts = _counts(n).to(gram)
        values, influence = _over_pairs(counts @ gram, gram.diagonal(), counts)
        slopes = counts * influence / (n * (n - 1))
        return Replicated(values, (slopes * influence).sum(1), slopes)

    return keep(truth, "unbiased square", compute)


def batch_square(truth: PerExampleTerms) -> Replicated:
    """‖C‖² of the batch, U + (mean K_nn - U)/N. Kept with the truth."""

    def compute() -> Replicated:
        pairs, n = unbiased_square(truth), truth.n
        own = truth.gram.diagonal().double()
        mean, variance = _mean(own)
        slopes = _counts(n).to(own) * (own - mean[:, None]) / (n * (n - 1))
        crossed = 2 * (n - 1) * (pairs.slopes @ own)
        return Replicated(
            ((n - 1) * pairs.values + mean) / n,
            ((n - 1) ** 2 * pairs.variance + crossed + variance) / n**2,
            ((n - 1) * pairs.slopes + slopes) / n,
        )

    return keep(truth, "batch square", compute)


def _over_pairs(met: Tensor, own: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """U-statistic Σ_{n≠m} c_n c_m k_nm / Σ_{n≠m} c_n c_m for counts c, [1 + R], and its influence.

    met [1 + R, N]: Σ_m c_m k_nm. own [N]: k_nn. The influence [1 + R, N] of an example is twice the
    mean of its k_nm with the others drawn, less the mean influence.
    """
    n = counts.shape[1]
    values = ((met * counts).sum(1) - counts.square() @ own) / (n**2 - counts.square().sum(1))
    influence = 2 * ((met - counts * own) / (n - counts) - values[:, None])
    return values, influence - (counts * influence).sum(1, keepdim=True) / n


def _mean(each: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the numbers [N] in the batch and its bootstrap samples, and its variance, [1 + R]."""
    n, centre = len(each), each.mean()
    apart = torch.stack([each - centre, (each - centre).square()], dim=1)
    moved = torch.cat([apart.mean(0)[None], bootstrap_counts(n).to(each) @ apart / n])
    return centre + moved[:, 0], (moved[:, 1] - moved[:, 0].square()) / (n - 1)


def _counts(n: int) -> Tensor:
    """How often the batch itself and its bootstrap samples draw each example, [1 + R, n]."""
    return torch.cat([torch.ones(1, n, dtype=torch.float64), bootstrap_counts(n)])


def _moments(
    truth: PerExampleTerms, approximation: Operator, square: Replicated, excess: float
) -> Moments:
    """Moments whose ‖C‖² is `square`, and ‖C - B‖² the batch's own less `excess`.

    The batch's own keeps its digits where B is close.
    """
    own = norms(truth, approximation)
    assert own.inners is not None
    cross, variance = _mean(own.inners)
    change = square.values - square.values[0] - 2 * (cross - cross[0])
    rows = [square.values, cross, own.error[0].item() - excess + change]
    rows += [square.variance, square.slopes @ own.inners, variance]
    known = len(change) if truth.n >= LEAST else 1
    first, second, third, *spread = (row[:known].cpu() for row in rows)
    return Moments(first, second, third, Variances(*spread), own.own, truth.n)
