"""The diagonal of the exact block, of any truth."""

from ..backpack import quantities
from ..exact import by_backpack, truth
from ..operators import Diagonal
from ..operators import diagonal as diagonal_of
from ..problem import Block, Problem
from ..registry import approximation

BY_BACKPACK = {
    "hessian": quantities.diag_hessian,
    "ggn": quantities.diag_ggn,
    "fisher_mc": quantities.diag_fisher_mc,
}


@approximation(
    reference="Becker and LeCun 1989",
    exact_on=("scalar_input_mse",),
)
def diagonal(
    problem: Problem, block: Block, of: str = "ggn", backend: str = "torch.func"
) -> Diagonal:
    """Diagonal [d] of the exact block, the nearest diagonal matrix in Frobenius norm.

    Works for every block. of="fisher": mean_n E_{t ~ model}[g²], over all labels; "fisher_mc": one
    sampled label per example (Martens 2020, arXiv:1412.1193, section 5); "empirical_fisher":
    mean_n g_n², the second moment of PER-EXAMPLE gradients, where Adam and RMSprop average the
    square of the minibatch's mean gradient. backend="backpack": BackPACK's DiagHessian,
    DiagGGNExact or DiagGGNMC, for the blocks it supports.

    Raises: ValueError for an unknown backend, or one that cannot do this block or truth.
    """
    if by_backpack(backend):
        if of not in BY_BACKPACK:
            raise ValueError(f"BackPACK has no diagonal of the {of}; it has {list(BY_BACKPACK)}")
        return BY_BACKPACK[of](problem, block)
    return Diagonal(diagonal_of(truth(problem, block, of)))
