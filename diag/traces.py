"""The identity as an operator, through which `inner` and `norms` give traces."""

import torch

from diag.operators import Diagonal, Operator, keep, like


def identity_like(operator: Operator) -> Diagonal:
    """I [d, d] in the operator's dtype and on its device; <C, I> = tr C. Kept with the operator.

    >>> identity_like(torch.zeros(2, 2)).diagonal.tolist()
    [1.0, 1.0]
    """
    return keep(
        operator,
        "identity",
        lambda: Diagonal(torch.ones(operator.shape[0]).to(like(operator))),
    )
