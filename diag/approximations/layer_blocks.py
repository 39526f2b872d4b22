"""Block-diagonal over the layers of a group."""

from ..exact import truth
from ..operators import BlockDiagonal, dense
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation


@approximation(
    "layer_blocks",
    of="ggn",
    kind="curvature",
    reference="Zhang et al. 2017 (arXiv:1712.07296), section 3",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def layer_blocks(problem: Problem, block: Block, of: str = "ggn") -> BlockDiagonal:
    """Keep each layer's exact block of a group of layers, drop what couples the layers.

    Equal to the truth for a block of one layer.
    """
    parts = [Block(member.module, (member,)) for member in block.members]
    return BlockDiagonal([dense(truth(problem, part, of)) for part in parts])
