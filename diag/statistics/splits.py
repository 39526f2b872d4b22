"""Distance between the exact blocks of two parts of a batch, from signed example weights.

A split gives weight 1/|P| to the examples of a part P, -1/|Q| to those of a part Q and 0 to others.
"""

import torch
from torch import Tensor

from ..truths.per_example import PerExampleTerms


def random_splits(
    n: int, first: int, second: int, splits: int, generator: torch.Generator | None = None
) -> Tensor:
    """Weights [splits, n] of random splits into `first` and `second` of n examples.

    generator: None takes a new one seeded with n, so that results repeat.

    Raises: ValueError for sizes under 1, more than n together, or fewer than one split.
    """
    if min(first, second, splits) < 1 or first + second > n:
        raise ValueError(
            f"cannot draw {splits} splits into {first} and {second} of {n} examples; sizes and "
            f"splits are at least 1, and the two sizes at most {n} together"
        )
    generator = generator or torch.Generator().manual_seed(n)
    order = torch.rand(splits, n, generator=generator, dtype=torch.float64).argsort(1)
    weights = torch.zeros(splits, n, dtype=torch.float64)
    weights.scatter_(1, order[:, :first], 1 / first)
    return weights.scatter_(1, order[:, first : first + second], -1 / second)


def signed_norms(gram: Tensor, weights: Tensor) -> Tensor:
    """‖Σ_n w_n T_n‖_F² = w K w for each row w of weights [s, N], given K [N, N], [s]."""
    weights = weights.to(gram)
    return ((weights @ gram) * weights).sum(1).clamp(min=0)


def split_floors(truth: PerExampleTerms, weights: Tensor) -> Tensor:
    """Squared noise floor from each split, ‖Σ_n w_n T_n‖² / (N Σ_n w_n² ‖C‖²), [s].

    Independent terms of variance σ² = E‖T_n - E C‖² give E‖Σ_n w_n T_n‖² = σ² Σ_n w_n² for weights
    that sum to zero, and E‖C - E C‖² = σ²/N: every split estimates the same floor.
    """
    scale = truth.n * weights.square().sum(1).to(truth.gram) * truth.gram.mean()
    return signed_norms(truth.gram, weights) / scale
