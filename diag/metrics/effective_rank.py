"""Ratio of effective ranks, the numbers of directions that share the curvature."""

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, inner, trace
from ..operators.compositions import identity_like
from ..registry import metric
from ..statistics.intervals import from_replicates, norms


@metric(
    formula="r(B) / r(C) with the participation ratio r(M) = (tr M)² / ‖M‖_F²",
    range="[0, ∞)",
    best="1",
    reference="participation ratio: Litwin-Kumar et al. 2017",
)
def effective_rank(truth: Operator, approximation: Operator | None = None) -> Estimate:
    """Effective rank of the approximation over that of the truth.

    r(M) = (Σ_j λ_j)² / Σ_j λ_j², the number of equal eigenvalues with the same sum and sum of
    squares: 1 for a single direction, d for a multiple of the identity, any number in [0, d] for an
    indefinite matrix. It needs no eigenvalues, unlike the exponential of the spectrum's entropy
    (Roy and Vetterli 2007). Range of the ratio [0, ∞), 1 is best; below 1 the approximation is more
    concentrated than the truth.
    approximation: None gives r(C) itself.
    Interval: bootstrap over the truth's examples, the approximation held fixed.
    """
    found = norms(truth, identity_like(truth))
    own: Tensor = found.cross.square() / found.square
    if approximation is None:
        return from_replicates(own, truth)
    rank = trace(approximation) ** 2 / inner(approximation, approximation)
    return from_replicates(rank / own, truth)
