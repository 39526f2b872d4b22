"""Which blocks are a Linear layer that sees one row per example, and what it sees."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diag.blocks import Block
from diag.problem import Problem


@dataclass(frozen=True)
class Rows:
    """A layer's inputs a [n, i] (with 1 appended for the bias) and the outputs the block has."""

    module: str
    a: Tensor
    outputs: slice
    left_size: int


def layer_rows(problem: Problem, block: Block) -> Rows | None:
    """Return the rows of a block inside one such layer; None where only the dense route applies.

    The layer must be an nn.Linear, called once, on a matrix with one row per example, and its
    parameters must belong to no other module.
    """
    member = block.single
    if member is None or not member.w_bar:
        return None
    module = problem.model.get_submodule(member.module)
    if type(module) is not nn.Linear or _shared(problem.model, module):
        return None
    x = problem.remember(("rows", member.module), lambda: _record(problem, module), 0)
    if x is None:
        return None
    start, stop = member.rows or (0, module.out_features)
    names = [name.rpartition(".")[2] for name in member.parameters]
    ones = x.new_ones(len(x), 1)
    a = torch.cat([x] * ("weight" in names) + [ones] * ("bias" in names), dim=1)
    return Rows(member.module, a, slice(start, stop), stop - start)


def _shared(model: nn.Module, module: nn.Module) -> bool:
    own = {id(p) for p in module.parameters(recurse=False)}
    others = (m for m in model.modules() if m is not module)
    return any(id(p) in own for m in others for p in m.parameters(recurse=False))


def _record(problem: Problem, module: nn.Module) -> Tensor | None:
    """The layer's input [n, in] if it is called exactly once with one row per example."""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, args, _o: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            problem.model(problem.inputs)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2 or len(seen[0]) != problem.n:
        return None
    return seen[0].clone()
