"""Eva: a damped rank-one Kronecker product of mean gradient and mean input."""

import torch

from ..operators import Damped, Kronecker
from ..problem import Block, Problem
from ..registry import approximation
from ._terms import roots
from ._variables import LABELLED


@approximation(
    reference="Zhang et al. 2023 (arXiv:2308.02123)",
    damping_inside=True,
)
def eva(
    problem: Problem, block: Block, of: str = "empirical_fisher", damping: float = 0.03
) -> Damped:
    """γI + ḡḡᵀ ⊗ āāᵀ with the MEANS of a layer's output gradients and inputs.

    ḡ [out]: mean over examples and positions of the PER-EXAMPLE loss's gradient w.r.t. the
    pre-activation (the optimizer's, of the mean loss, is smaller by the batch size); ā [in+1]: the
    same of the input with 1 appended. damping: γ, inside the matrix; damped metrics need
    approximation_damping=0. Only loosely a Fisher: the second moment of means, not the mean of
    second moments.

    Raises: ValueError for a truth that is no second moment of one gradient per example, a block
    that is no Linear layer or convolution, or a damping that is not positive.
    """
    if of not in LABELLED:
        raise ValueError(f"eva needs gradients with labels, not of='{of}'; known: {list(LABELLED)}")
    if damping <= 0:
        raise ValueError(f"damping must be positive, not {damping}: eva's matrix has rank one")
    found = roots(problem, block, of, "eva")
    a, g = found.a.mean((0, 1)), found.b.mean((0, 1, 2))
    return Damped(Kronecker(torch.outer(g, g), torch.outer(a, a)), damping)
