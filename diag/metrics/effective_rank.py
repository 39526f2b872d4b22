"""How many directions share the curvature."""

import math

from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, inner, trace
from ..operators.compositions import identity_like
from ..registry import metric
from ..statistics.intervals import from_replicates, norms


@metric(
    "effective_rank",
    formula="r(B) / r(C) with the participation ratio r(M) = (tr M)² / ‖M‖_F²",
    range="[0, ∞)",
    best="1",
    reference="participation ratio: Litwin-Kumar et al. 2017",
)
def effective_rank(truth: Operator, approximation: Operator | None = None) -> Estimate:
    """How many directions share the curvature: the approximation's number over the truth's.

    r(M) = (Σ_j λ_j)² / Σ_j λ_j², the number of equal eigenvalues with the same sum and the same
    sum of squares: 1 for a single direction, d for a multiple of the identity. Of the two usual
    effective ranks (the other is the exponential of the spectrum's entropy, Roy and Vetterli 2007)
    this one needs no eigenvalues and so is exact at any size. Range of the ratio [0, ∞), 1 is best;
    below 1 the approximation is more concentrated than the truth. An indefinite matrix may have
    any r in [0, d]: its eigenvalues cancel in the trace.
    approximation: None gives r(C) itself, the truth's own effective rank, in [0, d] directions.
    Interval: bootstrap over the truth's examples, the approximation held fixed.
    """
    found = norms(truth, identity_like(truth))
    own: Tensor = found.cross.square() / found.square
    if approximation is None:
        return from_replicates(own, truth, undefined=math.inf)
    rank = trace(approximation) ** 2 / inner(approximation, approximation)
    return from_replicates(rank / own, truth, undefined=math.inf)
