"""The diagonal of the exact block."""

from diag.blocks import Block
from diag.exact import truth
from diag.operators import Diagonal
from diag.operators import diagonal as diagonal_of
from diag.problem import Problem
from diag.registry import approximation


@approximation(
    "diagonal",
    of="ggn",
    kind="curvature",
    reference="Becker and LeCun 1989",
    exact_on=("scalar_input_mse",),
)
def diagonal(problem: Problem, block: Block, of: str = "ggn") -> Diagonal:
    """Keep the diagonal [d] of the exact block `of` the named truth, drop all else.

    The Frobenius-nearest diagonal matrix. Works for every block.
    """
    return Diagonal(diagonal_of(truth(problem, block, of)))
