"""Matrix cosine."""

from diag.estimate import Estimate
from diag.intervals import from_replicates, norms
from diag.operators import Operator, inner
from diag.registry import metric


@metric(
    "cosine",
    formula="<C, B> / (‖C‖_F ‖B‖_F)",
    range="[−1, 1]",
    best="1",
    reference="Golub and Van Loan 2013, section 2.3",
)
def cosine(truth: Operator, approximation: Operator) -> Estimate:
    """Cosine of the angle between the two matrices, <C, B> / (‖C‖_F ‖B‖_F).

    Range [−1, 1], 1 is best; blind to scale. NaN if either matrix is zero.
    Interval: bootstrap over the truth's examples, the approximation held fixed.
    """
    found = norms(truth, approximation)
    own = inner(approximation, approximation)
    cosines = found.cross / (found.square * own).sqrt()
    return from_replicates(cosines.clamp(-1, 1), truth, undefined=0.0)
