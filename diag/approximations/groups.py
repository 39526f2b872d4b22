"""Block-diagonal over chosen groups of layers: the curvature of block-diagonal Hessian-free."""

from collections.abc import Sequence

import torch

from diag.blocks import Block, Member
from diag.exact import truth
from diag.operators import BlockDiagonal, dense
from diag.problem import Problem
from diag.registry import approximation


@approximation(
    "groups",
    of="ggn",
    kind="curvature",
    reference="Zhang et al. 2017 (arXiv:1712.07296), section 3",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def groups(
    problem: Problem, block: Block, parts: Sequence[Sequence[str]] = (), of: str = "ggn"
) -> BlockDiagonal:
    """Keep the exact block of each group of a block's layers, drop what couples the groups.

    parts: the groups, each a sequence of module names, which stand for all layers inside them
    (["encoder"], or ["0", "2"]); every layer of the block that no part names is a group by itself,
    so that without parts this is `layer_blocks`. Coarser groups are never worse; one group of all
    layers is the truth.

    Raises: ValueError for a name that is no layer of the block, and a layer in two parts.
    """
    entries = torch.arange(block.d).split([member.d for member in block.members])
    own = dict(zip(block.members, entries, strict=True))
    blocks, order = [], []
    for part in _partition(block, parts):
        name = "+".join(member.module for member in part)
        blocks.append(dense(truth(problem, Block(name, part), of)))
        order += [own[member] for member in part]
    return BlockDiagonal(blocks, torch.cat(order).to(blocks[0].device))


def _partition(block: Block, parts: Sequence[Sequence[str]]) -> list[tuple[Member, ...]]:
    """Members of each part, in the block's order, then those of no part one by one."""
    found = [_members(block, part) for part in parts]
    named = [member for part in found for member in part]
    twice = sorted({member.module for member in named if named.count(member) > 1})
    if twice:
        raise ValueError(f"parts must not overlap: {twice} are in more than one of {list(parts)}")
    return [*found, *((member,) for member in block.members if member not in named)]


def _members(block: Block, part: Sequence[str]) -> tuple[Member, ...]:
    """The block's members inside the named modules."""
    if isinstance(part, str):
        raise ValueError(f"each part must be a sequence of module names, not the string '{part}'")
    layers = [member.module for member in block.members]
    for name in part:
        if not any(_inside(layer, name) for layer in layers):
            raise ValueError(f"no layer '{name}' in block {block}; its layers: {layers}")
    if not part:
        raise ValueError(f"an empty part; give module names, the block's layers are {layers}")
    return tuple(m for m in block.members if any(_inside(m.module, name) for name in part))


def _inside(layer: str, module: str) -> bool:
    return layer == module or layer.startswith(f"{module}.")
