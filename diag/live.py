"""Operators read from a running optimizer: its preconditioner, curvature and directions.

An optimizer is read through `preconditioner()` -> {block name: map}, and `curvature()` where it
holds one. A map is known by its parts, not its class: `.left` and `.right` of a Kronecker product,
`.blocks` (and `.order` of their coordinates) when block-diagonal, `.diagonal` when diagonal; else
`.shape` and `@`. What is read is copied, in the dtype asked for.

An optimizer that solves for its steps iteratively applies no map; `taken` reads its `directions()`
-> {block name: {parameter name: d}}.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .operators import BlockDiagonal, Dense, Diagonal, Kronecker, Operator, SingleStep, inverse
from .problem import Block, Problem


class Live(Protocol):
    """An optimizer that shows its preconditioner; `curvature()` is optional."""

    def preconditioner(self) -> dict[str, Any]:
        """Maps applied to the gradients, {block name: map}."""
        ...


class Directed(Protocol):
    """An optimizer that shows the last directions it solved for."""

    def directions(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Directions d of θ <- θ + lr d, {block name: {parameter name: d}}."""
        ...


def read(map_: Any, dtype: torch.dtype = torch.float64) -> Operator:
    """Copy of one live map as an operator.

    Raises: TypeError for an object without `.shape` and `@`.
    """
    if isinstance(map_, Tensor):
        return Dense(_copy(map_, dtype))
    factors = [getattr(map_, side, None) for side in ("left", "right")]
    if all(len(getattr(factor, "shape", ())) == 2 for factor in factors):  # not a sum of products
        return Kronecker(_matrix(map_.left, dtype), _matrix(map_.right, dtype))
    if hasattr(map_, "blocks"):
        blocks, order = map_.blocks, getattr(map_, "order", None)
        order = None if order is None else torch.as_tensor(order).clone()
        if isinstance(blocks, Tensor):
            return BlockDiagonal(_copy(blocks, dtype), order)
        return BlockDiagonal([_matrix(block, dtype) for block in blocks], order)
    if hasattr(map_, "diagonal") and isinstance(map_.diagonal, Tensor):
        return Diagonal(_copy(map_.diagonal, dtype))
    return Dense(_matrix(map_, dtype))


def preconditioners(optimizer: Live, dtype: torch.dtype = torch.float64) -> dict[str, Operator]:
    """Copies of the maps the optimizer applies now, {block name: operator}."""
    return {name: read(map_, dtype) for name, map_ in optimizer.preconditioner().items()}


def curvatures(optimizer: Live, dtype: torch.dtype = torch.float64) -> dict[str, Operator]:
    """Curvatures P⁻¹ implied by the live preconditioners P, with the damping inside.

    Damped metrics take it with approximation_damping=0.
    """
    return {name: inverse(P) for name, P in preconditioners(optimizer, dtype).items()}


def undamped(optimizer: Live, dtype: torch.dtype = torch.float64) -> dict[str, Operator]:
    """Undamped curvatures the optimizer holds, from its `curvature()`; {} if it holds none."""
    held = getattr(optimizer, "curvature", None)
    return {} if held is None else {name: read(map_, dtype) for name, map_ in held().items()}


def taken(
    optimizer: Directed, problem: Problem, weight_decay: float = 0.0
) -> dict[Block, SingleStep]:
    """Last directions d of the optimizer as single steps, by its blocks as blocks of the problem.

    A direction goes down, θ <- θ + lr d, metrics judge θ - step: the step is -d, without learning
    rate, line search or backtracking. Metrics take it with gradient=step.gradient,
    approximation_damping=0 and the damping the optimizer solved with, λ + τ. Blocks without a
    direction yet are left out.

    problem: the batch whose gradient d was made from, made BEFORE the step (it copies the model).
    Curvature from part of the batch: `kronscope.diag.cross_fit.restricted(problem, rows)`.
    weight_decay: τ of an L2 term in the optimizer's gradient, g + τθ; 0 for decoupled decay.

    Raises: ValueError for directions that are not of whole layers of the problem, or not finite.
    """
    found = {}
    for name, direction in optimizer.directions().items():
        if direction:
            block = _block_of(problem, name, direction)
            theta: dict[str, Tensor] = {n: problem.model.get_parameter(n) for n in block.parameters}
            gradient = problem.gradient(block) + weight_decay * block.join(theta)
            found[block] = SingleStep(gradient.detach(), -block.join(dict(direction)).to(gradient))
    return found


def _block_of(problem: Problem, name: str, direction: Mapping[str, Tensor]) -> Block:
    """Block of the problem's layers that the direction is of."""
    layers = problem.blocks()
    own = [layer for layer in layers if not set(layer.parameters).isdisjoint(direction)]
    block = Block(name, tuple(layer.members[0] for layer in own))
    if differing := sorted(set(block.parameters) ^ set(direction)):
        raise ValueError(
            f"the direction of block '{name}' is not of whole layers of the problem: only one of "
            f"the two has {differing}; the problem's layers: {[layer.name for layer in layers]}"
        )
    for parameter, d in direction.items():
        shape = tuple(problem.model.get_parameter(parameter).shape)
        if tuple(d.shape) != shape:
            raise ValueError(
                f"the direction of block '{name}' has shape {tuple(d.shape)} for {parameter}, "
                f"which has {shape} in the problem; give the model that the optimizer trains"
            )
    return block


def _matrix(part: Any, dtype: torch.dtype) -> Tensor:
    """A factor as a matrix: itself, or what its `@` does to the identity."""
    if isinstance(part, Tensor):
        return _copy(part, dtype)
    if not hasattr(part, "shape") or not hasattr(part, "__matmul__"):
        raise TypeError(
            f"cannot read a {type(part).__name__} as an operator: it needs .shape and @, or "
            f".left and .right, .blocks, or .diagonal"
        )
    made_of = _first_tensor(part)
    like = torch.empty(0) if made_of is None else made_of
    return _copy(part @ torch.eye(part.shape[0], dtype=like.dtype, device=like.device), dtype)


def _first_tensor(part: Any) -> Tensor | None:
    """A floating-point tensor of the map, for its precision and device."""
    if isinstance(part, Tensor):
        return part if part.is_floating_point() else None
    if isinstance(part, Sequence) and not isinstance(part, str):
        inside: Iterable[Any] = part
    else:
        inside = getattr(part, "__dict__", {}).values()
    return next((found for each in inside if (found := _first_tensor(each)) is not None), None)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype, copy=True)
