"""Relative error in units of the noise floor."""

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, keep
from ..registry import metric
from ..statistics.intervals import bootstrap_counts, from_replicates, norms
from ..truths.per_example import PerExampleTerms
from .noise_floor import noise_floor


@metric(
    formula="(‖C − B‖_F / ‖C‖_F) / noise floor = ‖C − B‖_F / expected ‖C − E C‖_F",
    range="[0, ∞)",
    best="0",
    reference="balanced half-samples: McCarthy 1969",
)
def error_over_noise(truth: Operator, approximation: Operator) -> Estimate:
    """Relative error over the noise floor.

    Range [0, ∞), 0 is best; below 1 the approximation is nearer to this batch's block than that is
    to the population's, and cannot be told from the truth. NaN for an exact approximation of a
    truth whose examples all agree.
    Interval: bootstrap of error and noise over the truth's examples, the approximation held fixed.

    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    floor = noise_floor(truth).value
    assert isinstance(truth, PerExampleTerms)  # noise_floor has seen to it
    found = norms(truth, approximation)
    noise = floor**2 * found.square[0] * keep(truth, "noise factors", lambda: _factors(truth.gram))
    return from_replicates((found.error / noise).sqrt(), truth)


def _factors(gram: Tensor) -> Tensor:
    """Bootstrap replicates of the noise's square in units of the batch's own, [1 + REPLICATES].

    The expected square is that of a mean of N terms, (mean K_nn - mean K)/(N - 1); re-drawn from
    the batch it is corrected by N/(N - 1).
    """
    n = len(gram)
    counts = bootstrap_counts(n).to(gram)
    spread = counts @ gram.diagonal() / n - ((counts @ gram) * counts).sum(1) / n**2
    own = gram.diagonal().mean() - gram.mean()
    return torch.cat([own.new_ones(1), spread * n / (n - 1) / own]).double().cpu()
