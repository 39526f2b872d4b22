"""The Kronecker product nearest to the damped inverse."""

import torch

from ..exact import truth
from ..operators import BUDGET, Damped, Dense, Kronecker, dense
from ..problem import Block, Problem
from ..registry import approximation
from ..spectra.kronecker_svd import leading_kronecker


@approximation(
    kind="preconditioner",
    reference="Van Loan and Pitsianis 1993, applied to the damped inverse",
)
def best_inverse_kronecker(
    problem: Problem, block: Block, damping: float = 0.1, of: str = "ggn"
) -> Kronecker:
    """The Kronecker product nearest to the damped inverse of the exact block.

    argmin ‖P ⊗ Q − (C + λI)⁻¹‖_F over P [out, out], Q [in+1, in+1]

    A PRECONDITIONER, with the damping λ inside; its own inverse is the curvature to compare with
    C + λI. Both factors are positive semi-definite where C + λI is positive definite. Found from
    the dense inverse.

    Raises: ValueError for a damping below zero, a block that is not one layer with [W, b], or one
    whose dense inverse is over the memory budget; torch.linalg.LinAlgError where C + λI is
    singular.
    """
    if damping < 0:
        raise ValueError(f"damping must not be negative, but is {damping}")
    if 8 * block.d**2 > BUDGET:
        raise ValueError(
            f"best_inverse_kronecker forms the inverse of block {block}, "
            f"{8 * block.d**2 / 2**30:.1f} GiB, over the budget of {BUDGET / 2**30:.1f} GiB; "
            f"best_kronecker, kfac and tkfac never form a dense matrix"
        )
    inverse = torch.linalg.inv(dense(Damped(truth(problem, block, of), damping)))
    (nearest,) = leading_kronecker(Dense((inverse + inverse.T) / 2), 1, block).terms
    sign = -1 if nearest.left.trace() < 0 else 1
    return Kronecker(sign * nearest.left, sign * nearest.right)
