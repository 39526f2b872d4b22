"""Curvature-vector products, at a layer's pre-activations or in a block.

A function maps shifts v, of the pre-activations or of the block's parameters, to the model outputs;
the curvature of the summed loss with respect to v is applied to many directions at once.
"""

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from ..operators.structures import Map
from ..problem.blocks import Block
from ..problem.functional import plain_attention
from ..problem.problem import Problem
from .loss_roots import loss_roots, output_curvature

CHUNK_BYTES = 2**28  # memory for the batched directions of one vmapped product


@plain_attention()
def layer_curvature(problem: Problem, module: str, of: str) -> Tensor:
    """Curvature C_n of every example's loss w.r.t. the layer's pre-activation, [n, out, out].

    of: "hessian", "ggn" or "fisher".
    """
    layer = problem.model.get_submodule(module)
    assert isinstance(layer, nn.Linear)

    def outputs(shift: Tensor) -> Tensor:
        handle = layer.register_forward_hook(lambda _m, _a, z: z + shift)
        try:
            return problem.model(problem.inputs)
        finally:
            handle.remove()

    zero = problem.inputs.new_zeros(
        problem.n, layer.out_features, dtype=next(layer.parameters()).dtype
    )
    # row j of every C_n at once: the same direction e_j in each example
    directions = torch.eye(layer.out_features).to(zero)[:, None, :].expand(-1, problem.n, -1)
    products = _products(problem, outputs, zero, of)
    return _in_chunks(products, directions, problem.n * _width(problem)).movedim(0, 1)


@plain_attention()
def block_products(
    problem: Problem, block: Block, of: str, samples: int, generator: torch.Generator | None
) -> Map:
    """The map of rows [k, d] to products with the block's curvature of the batch-mean loss."""

    def outputs(v: Tensor) -> Tensor:
        return problem.outputs(block, v)

    zero = torch.zeros(block.d).to(problem.model.get_parameter(block.parameters[0]))
    products = _products(problem, outputs, zero, of, samples, generator)

    @plain_attention()  # a product may call the model again
    def multiplied(rows: Tensor) -> Tensor:
        return _in_chunks(products, rows, problem.n * _width(problem)) / problem.n

    return multiplied


def dense_block(
    problem: Problem, block: Block, of: str, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Curvature of the batch-mean loss w.r.t. the block's parameters, [d, d], by d products."""
    directions = torch.eye(block.d).to(problem.model.get_parameter(block.parameters[0]))
    return block_products(problem, block, of, samples, generator)(directions)


def _products(
    problem: Problem,
    outputs: Map,
    zero: Tensor,
    of: str,
    samples: int = 1,
    generator: torch.Generator | None = None,
) -> Map:
    """The map v -> curvature of the summed loss times v."""
    if of == "hessian":
        # reverse over reverse: twice as fast as forward over reverse, and defined for every loss
        slope = grad(lambda v: problem.total_loss(outputs(v)))
        pull = vjp(slope, zero)[1]
        return lambda v: pull(v)[0]
    z, pull = vjp(outputs, zero)[:2]
    bend = _output_curvature(problem, z.detach(), of, samples, generator)
    return lambda v: pull(bend(jvp(outputs, (zero,), (v,))[1]))[0]


def _output_curvature(
    problem: Problem, z: Tensor, of: str, samples: int, generator: torch.Generator | None
) -> Map:
    """The map u -> curvature of the summed loss w.r.t. the outputs times u."""
    if of in ("ggn", "fisher"):
        return output_curvature(problem, z, of)
    stack = loss_roots(problem, of, samples, generator)
    assert stack is not None  # gradients are roots whatever the loss
    return lambda u: stack.apply(u.reshape(len(u), -1, 1)).reshape(u.shape)


def _width(problem: Problem) -> int:
    """Rough number of floats that one example takes in a pass."""
    widths = [max(p.shape) for p in problem.model.parameters() if p.ndim]
    return sum(widths) or 1


def _in_chunks(function: Map, directions: Tensor, floats_each: int) -> Tensor:
    """The function of directions [k, ...], vmapped in chunks that fit CHUNK_BYTES."""
    chunk = max(1, CHUNK_BYTES // (8 * floats_each))
    return vmap(function, chunk_size=min(chunk, len(directions)))(directions)
