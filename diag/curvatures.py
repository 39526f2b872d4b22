"""The five curvatures as products with vectors, at a layer's pre-activations or in a block.

Both routes are one idea: f maps shifts v (of the pre-activations, or of the block's parameters) to
the model's outputs, and the curvature of the summed loss is applied to a set of directions at once.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap

from diag.blocks import Block
from diag.likelihoods import likelihood_of
from diag.problem import Problem

Outputs = Callable[[Tensor], Tensor]

CHUNK_BYTES = 2**28  # memory for the batched directions of one vmapped sweep


def layer_curvature(
    problem: Problem, module: str, of: str, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Curvature C_n of every example's loss w.r.t. the layer's pre-activation, [n, out, out]."""
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
    if of in ("empirical_fisher", "fisher_mc"):
        scores = _scores(problem, of, samples, generator)
        g = torch.stack([vjp(outputs, zero)[1](score)[0] for score in scores])  # [s, n, out]
        return torch.einsum("sno,snp->nop", g, g) / len(scores)
    # row j of every C_n at once: the same direction e_j in each example, which do not interact
    directions = torch.eye(layer.out_features).to(zero)[:, None, :].expand(-1, problem.n, -1)
    products = _products(problem, outputs, zero, of)
    return _sweep(products, directions, problem.n * _width(problem)).movedim(0, 1)


def dense_block(
    problem: Problem, block: Block, of: str, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Curvature of the batch-mean loss w.r.t. the block's parameters, [d, d], by d products."""

    def outputs(v: Tensor) -> Tensor:
        return problem.outputs(block, v)

    parameter = problem.model.get_parameter(block.parameters[0])
    zero = torch.zeros(block.d).to(parameter)
    directions = torch.eye(block.d).to(parameter)
    if of in ("empirical_fisher", "fisher_mc"):
        scores = _scores(problem, of, samples, generator)

        def slopes(v: Tensor) -> Tensor:  # one entry of every g_n, [s·n]
            tangent = jvp(outputs, (zero,), (v,))[1]
            return (scores * tangent).flatten(2).sum(2).flatten()

        gradients = _sweep(slopes, directions, problem.n * _width(problem))  # [d, s·n]
        return gradients @ gradients.T / gradients.shape[1]
    products = _products(problem, outputs, zero, of)
    return _sweep(products, directions, problem.n * _width(problem)) / problem.n


def _products(problem: Problem, outputs: Outputs, zero: Tensor, of: str) -> Outputs:
    """V -> curvature of the summed loss times v, for hessian, ggn and fisher."""
    if of == "hessian":
        # reverse over reverse: the matrix is symmetric, so a pull-back multiplies with it; twice as
        # fast here as forward over reverse, and every loss has the formulas for it
        hessian: Outputs = _transposed(grad(lambda v: problem.total_loss(outputs(v))), zero)
        return hessian
    z, pull = vjp(outputs, zero)[:2]
    bend = _output_curvature(problem, z.detach(), of)
    return lambda v: pull(bend(jvp(outputs, (zero,), (v,))[1]))[0]


def _transposed(function: Outputs, at: Tensor) -> Outputs:
    """U -> Jᵀ u for the Jacobian J of a function of one tensor."""
    pull = vjp(function, at)[1]
    return lambda u: pull(u)[0]


def _output_curvature(problem: Problem, z: Tensor, of: str) -> Outputs:
    """U -> curvature of the summed loss w.r.t. the outputs, times u; both like the outputs."""
    if of == "fisher":
        likelihood, scale = likelihood_of(problem)
        return lambda u: scale * likelihood.fisher(z, u)
    return _transposed(grad(problem.total_loss), z)


def _scores(problem: Problem, of: str, samples: int, generator: torch.Generator | None) -> Tensor:
    """Gradients of the per-example losses w.r.t. the outputs, [samples, n, ...].

    Sampled ones are scaled by √s for a loss s·(-log p), so that their second moment is s·Fisher.
    """
    with torch.no_grad():
        z = problem.model(problem.inputs)
    if of == "empirical_fisher":
        return grad(problem.total_loss)(z)[None]
    likelihood, scale = likelihood_of(problem)
    assert generator is not None
    drawn = [likelihood.score(z, likelihood.sample(z, generator)) for _ in range(samples)]
    return scale**0.5 * torch.stack(drawn)


def _width(problem: Problem) -> int:
    """Rough number of floats one example occupies in a pass: its parameters bound its layers."""
    widths = [max(p.shape) for p in problem.model.parameters() if p.ndim]
    return sum(widths) or 1


def _sweep(function: Outputs, directions: Tensor, floats_each: int) -> Tensor:
    """Function over directions [k, ...], batched in chunks that fit CHUNK_BYTES."""
    chunk = max(1, CHUNK_BYTES // (8 * floats_each))
    return vmap(function, chunk_size=min(chunk, len(directions)))(directions)
