"""Error of the best sum of r Kronecker products as a function of r, with intervals."""

import torch

from ..estimate import Estimate
from ..operators import Operator, inner
from ..problem.blocks import Block
from ..statistics.intervals import deviations, from_replicates, inner_deviations
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.per_example import PerExampleTerms
from .kronecker_svd import best_kronecker_errors, leading_kronecker


def best_kronecker_curve(truth: Operator, ranks: int, block: Block | None = None) -> list[Estimate]:
    """Relative error of the best sum of r Kronecker products, r = 1 ... ranks, with intervals.

    (‖C‖² − Σ_{k<=r} σ_k²)^½ / ‖C‖. Interval: first-order bootstrap over the truth's examples, the
    singular vectors held fixed (they are stationary); none without per-example terms.

    Raises: ValueError for ranks < 1 or a truth without Kronecker factors.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, not {ranks}")
    values = best_kronecker_errors(truth, ranks, block).cpu()  # where the deviations are
    if not isinstance(truth, PerExampleTerms) or truth.n == 1:
        return [Estimate(value, n=getattr(truth, "n", 0)) for value in values.tolist()]
    whole = inner(truth, truth)
    moved = whole + deviations(truth)
    left = (values.double() ** 2 * whole)[:, None] + deviations(truth)
    found = []
    leading = leading_kronecker(truth, ranks, block)
    by_term = (
        truth.inners_by_term(leading).T
        if isinstance(truth, KroneckerTerms)
        else [truth.inners(term) for term in leading.terms]
    )
    for r, own in enumerate(by_term):
        # σ_k² moves by 2 σ_k <dC, L_k ⊗ R_k>, and the term holds σ_k L_k ⊗ R_k
        left[r:] -= 2 * inner_deviations(own.double()).to(left)
    for value, square in zip(values, left.clamp(min=0), strict=True):
        errors = (square / moved.clamp(min=0)).sqrt()
        replicates = torch.cat([value.double()[None].cpu(), errors.cpu()])
        found.append(from_replicates(replicates, truth, undefined=torch.inf))
    return found
