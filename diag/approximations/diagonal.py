"""The diagonal of the exact block, of each kind of curvature that is used as one."""

from ..backpack import quantities
from ..exact import by_backpack, truth
from ..operators import Diagonal
from ..operators import diagonal as diagonal_of
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation

BY_BACKPACK = {
    "hessian": quantities.diag_hessian,
    "ggn": quantities.diag_ggn,
    "fisher_mc": quantities.diag_fisher_mc,
}


@approximation(
    "diagonal",
    of="ggn",
    kind="curvature",
    reference="Becker and LeCun 1989",
    exact_on=("scalar_input_mse",),
)
def diagonal(
    problem: Problem, block: Block, of: str = "ggn", backend: str = "torch.func"
) -> Diagonal:
    """Keep the diagonal [d] of the exact block `of` the named truth, drop all else.

    The Frobenius-nearest diagonal matrix. Works for every block. backend="backpack": BackPACK's
    DiagHessian, DiagGGNExact or DiagGGNMC, for the blocks it supports.

    Raises: ValueError for an unknown backend, or one that cannot do this block or truth.
    """
    if by_backpack(backend):
        if of not in BY_BACKPACK:
            raise ValueError(f"BackPACK has no diagonal of the {of}; it has {list(BY_BACKPACK)}")
        return BY_BACKPACK[of](problem, block)
    return Diagonal(diagonal_of(truth(problem, block, of)))


@approximation(
    "diagonal_fisher",
    of="fisher",
    kind="curvature",
    reference="diagonal of Martens 2020 (arXiv:1412.1193), section 5",
    exact_on=("scalar_input_mse",),
)
def diagonal_fisher(problem: Problem, block: Block, of: str = "fisher") -> Diagonal:
    """Diagonal [d] of the Fisher, mean_n E_{t ~ model}[g²]: unless told otherwise over all labels.

    The same numbers as `diagonal` of the same truth; where the GGN is the Fisher, as
    `diagonal` itself. of: "fisher_mc" for one sampled label per example. Works for every block.

    Raises: ValueError when the loss belongs to no known likelihood.
    """
    return diagonal(problem, block, of)


@approximation(
    "diagonal_empirical",
    of="empirical_fisher",
    kind="curvature",
    reference="diagonal of Kunstner et al. 2019 (arXiv:1905.12558), equation 3",
    exact_on=("scalar_input_mse",),
)
def diagonal_empirical(problem: Problem, block: Block, of: str = "empirical_fisher") -> Diagonal:
    """Diagonal [d] of the empirical Fisher, mean_n g_n² over the data's own labels.

    The second moment of the PER-EXAMPLE gradients; Adam and RMSprop average the square of the
    minibatch's mean gradient instead. The same numbers as `diagonal` of the same truth. Works for
    every block.
    """
    return diagonal(problem, block, of)
