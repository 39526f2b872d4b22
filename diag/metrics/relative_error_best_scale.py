"""Relative error in the Frobenius norm at the best scale of the approximation."""

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator
from ..randomized.frobenius import probed_best_scale_error
from ..registry import metric
from ..statistics.intervals import Norms
from ..statistics.moments import batch_moments
from ..statistics.population import best_scale_estimate
from ..truths.matrix_free import MatrixFree

NEAR = 0.9  # squared cosine above which 1 − cos² would cancel


@metric(
    formula="min_c ‖C − cB‖_F / ‖C‖_F = √(1 − cos²)",
    range="[0, 1]",
    best="0",
    reference="Golub and Van Loan 2013, section 5.3",
)
def relative_error_best_scale(truth: Operator, approximation: Operator) -> Estimate:
    """Relative error of the best multiple of the approximation, √(1 − cos²).

    min_c ‖C − cB‖_F / ‖C‖_F = √(1 − cos²(C, B)), at c = <C,B>/‖B‖². Range [0, 1], 0 is best. A
    learning rate absorbs c, so this is what matters for a step's direction. Computed near 0 from
    ‖C − B‖², which does not cancel there.
    Interval: bootstrap-t over the truth's examples, the approximation held fixed, for the error
    typical of batches of this size. A truth known by products alone is estimated from 100 random
    probes, with their interval.
    """
    if isinstance(truth, MatrixFree):
        return probed_best_scale_error(truth, approximation)
    return best_scale_estimate(batch_moments(truth, approximation))


def best_scale_error(found: Norms) -> Tensor:
    """√(1 − cos²) from the norms, without its cancellation near 0."""
    own = found.own
    squared_cosine = found.cross.square() / (found.square * own)
    left = found.error - (1 - found.cross / own) ** 2 * own
    # far from 1 the cosine loses nothing, while a B of another scale drowns the difference
    far = 1 - squared_cosine
    return torch.where(squared_cosine < NEAR, far, left / found.square).clamp(0, 1).sqrt()
