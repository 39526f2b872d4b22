"""Relative Frobenius error at the best scale."""

from torch import Tensor

from diag.estimate import Estimate
from diag.intervals import Norms, from_replicates, norms
from diag.operators import Operator, inner
from diag.registry import metric


@metric(
    "relative_error_best_scale",
    formula="min_c ‖C − cB‖_F / ‖C‖_F = √(1 − cos²)",
    range="[0, 1]",
    best="0",
    reference="Golub and Van Loan 2013, section 5.3",
)
def relative_error_best_scale(truth: Operator, approximation: Operator) -> Estimate:
    """What error is left when the approximation may be multiplied by any number.

    min_c ‖C − cB‖_F / ‖C‖_F = √(1 − cos²(C, B)), reached at c = <C,B>/‖B‖². Range [0, 1], 0 is
    best. A learning rate absorbs such a factor, so this is what matters for a step's direction.
    Computed as √((‖C − B‖² − (1 − c)² ‖B‖²) / ‖C‖²), which does not cancel near 0.
    Interval: bootstrap over the truth's examples, the approximation held fixed.
    """
    found = norms(truth, approximation)
    own = inner(approximation, approximation)
    return from_replicates(best_scale_error(found, own), truth, undefined=1.0)


def best_scale_error(found: Norms, own: float) -> Tensor:
    """√(1 − cos²) from the norms and ‖B‖², without its cancellation near 0."""
    left = found.error - (1 - found.cross / own) ** 2 * own
    return (left / found.square).clamp(0, 1).sqrt()
