"""Sampling noise of the exact block itself."""

import math

import torch

from diag.estimate import Estimate
from diag.intervals import from_replicates, half_split_norms
from diag.operators import Operator
from diag.registry import metric
from diag.sampled import Sampled

SPLITS = 400


@metric(
    "noise_floor",
    formula="rms over random halves of ‖C₁ − C₂‖_F / (2 ‖C‖_F)",
    range="[0, ∞)",
    best="0",
    reference="balanced half-samples: McCarthy 1969",
)
def noise_floor(truth: Operator, approximation: Operator | None = None) -> Estimate:
    """How far the exact block of this batch is from the population's: the error's natural unit.

    C₁, C₂ are the exact blocks of random halves of the batch. Their difference has four times the
    variance of C itself, so half its norm is the expected distance ‖C − E C‖_F. An approximation
    whose relative error is below this floor cannot be told from the truth with so few examples.
    Value: root mean square over 400 splits; interval: their 2.5 % and 97.5 % quantiles.

    approximation is not used; it is there so that all metrics are called alike.
    Raises: ValueError for a truth without per-example terms or with fewer than two examples.
    """
    del approximation
    if not isinstance(truth, Sampled) or truth.n < 2:
        raise ValueError(
            f"the noise floor splits the batch and needs a truth made of per-example terms with "
            f"at least 2 examples, not a {type(truth).__name__} of {getattr(truth, 'n', 0)}; "
            f"Linear layers with one row per example have them"
        )
    halves = half_split_norms(truth.gram, SPLITS) / (4 * truth.gram.mean())
    return from_replicates(
        torch.cat([halves.mean()[None], halves]).sqrt(), truth, undefined=math.inf
    )
