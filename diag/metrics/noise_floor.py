"""Sampling noise of the exact block, relative to its norm."""

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..statistics.intervals import from_replicates
from ..statistics.splits import random_splits, split_floors
from ..truths.per_example import PerExampleTerms

SPLITS = 400


@metric(
    formula="rms over random halves of ‖C₁ − C₂‖_F / (2 ‖C‖_F)",
    range="[0, ∞)",
    best="0",
    reference="balanced half-samples: McCarthy 1969",
)
def noise_floor(
    truth: Operator, approximation: Operator | None = None, weights: Tensor | None = None
) -> Estimate:
    """Relative distance of the batch's exact block from the population's, by random halves.

    C₁, C₂ are the exact blocks of random halves of the batch. Their difference has four times the
    variance of C, so half its norm is the expected distance ‖C − E C‖_F. An approximation whose
    relative error is below this floor cannot be told from the truth with so few examples.
    Value: root mean square over 400 splits. Interval: their 2.5 % and 97.5 % quantiles, which hold
    this batch's own ‖C − E C‖/‖C‖ in 0.92 to 0.96 of batches where the floor is below 0.45, in
    0.72 to 0.89 at 0.5 to 0.75 (heavy tails). No interval from one split.

    approximation: not used; all metrics are called alike.
    weights: [s, N], other splits than halves, by `statistics.random_splits`; each ‖C₁ − C₂‖ is
    scaled by its sizes, (N/N₁ + N/N₂)^-½.
    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    del approximation
    if not isinstance(truth, PerExampleTerms) or truth.n < 2:
        raise ValueError(
            f"the noise floor splits the batch and needs a truth made of per-example terms with "
            f"at least 2 examples, not a {type(truth).__name__} of {getattr(truth, 'n', 0)}; "
            f"the GGN and the Fishers of every layer have them"
        )
    if weights is None:
        weights = random_splits(truth.n, truth.n // 2, truth.n // 2, SPLITS)
    floors = split_floors(truth, weights).cpu()
    shown = [floors.mean()[None], floors] if len(floors) > 1 else [floors]
    return from_replicates(torch.cat(shown).sqrt(), truth)
