"""Curvature that is block-diagonal over groups of layers, as in block-diagonal Hessian-free."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ..exact import truth
from ..operators import BlockDiagonal, dense
from ..problem import Block, Member, Problem
from ..registry import approximation

Names = Sequence[Sequence[str]]
Partition = Names | Callable[[nn.Module], Names] | None


@approximation(
    reference="Zhang et al. 2017 (arXiv:1712.07296), section 3",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def groups(problem: Problem, block: Block, parts: Partition = (), of: str = "ggn") -> BlockDiagonal:
    """Exact curvature of each group of a block's layers, by default each layer; zero between them.

    parts: the groups, each a sequence of module names that stand for all layers inside them
    (["encoder"], or ["0", "2"]; "" is the model); a layer that no part names is a group by itself.
    None is one group of all layers, the truth; a function makes the names from the model. In the
    words of `HessianFree(blocks=...)`, but that a parameter shared by several modules belongs to
    the first of them. Coarser groups are never worse.

    Raises: ValueError for an unknown name, a part without layers, and a layer in two parts.
    """
    entries = torch.arange(block.d).split([member.d for member in block.members])
    own = dict(zip(block.members, entries, strict=True))
    blocks, order = [], []
    for part in _partition(problem.model, block, parts):
        name = "+".join(member.module for member in part)
        blocks.append(dense(truth(problem, Block(name, part), of)))
        order += [own[member] for member in part]
    return BlockDiagonal(blocks, torch.cat(order).to(blocks[0].device))


def _partition(model: nn.Module, block: Block, parts: Partition) -> list[tuple[Member, ...]]:
    """Members of each part, in the block's order, then those of no part one by one."""
    if parts is None:
        return [block.members]
    names = parts(model) if callable(parts) else parts
    found = [_members(model, block, part) for part in names]
    named = [member for part in found for member in part]
    twice = sorted({member.module for member in named if named.count(member) > 1})
    if twice:
        raise ValueError(f"parts must not overlap: {twice} are in more than one of {list(names)}")
    return [*found, *((member,) for member in block.members if member not in named)]


def _members(model: nn.Module, block: Block, part: Sequence[str]) -> tuple[Member, ...]:
    """The block's members inside the named modules; some of these may hold none."""
    if isinstance(part, str):
        raise ValueError(f"each part must be a sequence of module names, not the string '{part}'")
    layers, modules = [member.module for member in block.members], dict(model.named_modules())
    for name in part:
        if name not in modules:
            raise ValueError(f"no layer '{name}' in block {block}; its layers: {layers}")
    if not part:
        raise ValueError(f"an empty part; give module names, the block's layers are {layers}")
    found = tuple(m for m in block.members if any(_inside(m.module, name) for name in part))
    if not found:
        raise ValueError(f"{list(part)} hold no layer of block {block}; its layers: {layers}")
    return found


def _inside(layer: str, module: str) -> bool:
    return not module or layer == module or layer.startswith(f"{module}.")
