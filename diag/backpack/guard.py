"""Products by torch.func that BackPACK's results must agree with before they are returned.

BackPACK reads a model module by module; one that it misreads gives another matrix.
"""

import torch
from torch import Tensor
from torch.func import grad, jvp, vjp, vmap

from ..problem import Block, Problem
from ..problem.functional import plain_attention
from .support import INSTEAD, UnsupportedError

PROBED = 16  # entries of a diagonal that are compared

# what two engines may differ by: relative to the largest entry, or, where that is next to nothing
# (a gradient at a minimum), this many units in the last place of 1
AGREEMENT = {torch.float64: 1e-8, torch.float32: 1e-3}
ULPS = 100


def check_agreement(what: str, block: Block, found: Tensor, expected: Tensor) -> None:
    """Raise UnsupportedError where BackPACK's `found` is not what torch.func computes."""
    if found.shape != expected.shape:
        raise UnsupportedError(
            f"BackPACK's {what} of block '{block.name}' has shape {tuple(found.shape)}, not "
            f"{tuple(expected.shape)}: it misreads this model; {INSTEAD}"
        )
    error = (found - expected).abs().max().item()
    scale = expected.abs().max().item()
    floor = ULPS * torch.finfo(expected.dtype).eps
    if not error <= AGREEMENT.get(expected.dtype, 1e-1) * scale + floor:
        raise UnsupportedError(
            f"BackPACK's {what} of block '{block.name}' differs from torch.func's by {error:.3g} "
            f"(largest entry {scale:.3g}): it misreads this model; {INSTEAD}"
        )


@plain_attention()
def check_ggn(problem: Problem, block: Block, root: Tensor, examples: int | None = None) -> None:
    """Compare rootᵀroot, root [k, d], times one random vector with torch.func's product.

    examples: number of the first examples that the root is of; None for all.
    """
    u = _random(root[0])
    z, pull = vjp(lambda v: problem.outputs(block, v), torch.zeros_like(u))[:2]
    bent = _bent(problem, z, _pushed(problem, block, u))
    if examples is not None:
        bent[examples:] = 0
    check_agreement("SqrtGGNExact", block, root.T @ (root @ u), pull(bent)[0] / problem.n)


@plain_attention()
def check_gradients(problem: Problem, block: Block, g: Tensor) -> None:
    """Compare per-example gradients g [n, d], times one random vector, with torch.func's."""
    u = _random(g[0])
    with torch.no_grad():
        z = problem.model(problem.inputs)
    slopes = grad(problem.total_loss)(z) * _pushed(problem, block, u)
    check_agreement("BatchGrad", block, g @ u, slopes.reshape(problem.n, -1).sum(1))


@plain_attention()
def check_diagonal(problem: Problem, block: Block, found: Tensor, of: str) -> None:
    """Compare some entries of a "ggn" or "hessian" block's diagonal [d] with torch.func's."""
    places = torch.randperm(block.d, generator=torch.Generator().manual_seed(0))[:PROBED]
    directions = found.new_zeros(len(places), block.d)
    directions[range(len(places)), places] = 1
    zero = torch.zeros_like(found)

    def ggn_entry(v: Tensor) -> Tensor:
        z, slope = jvp(lambda w: problem.outputs(block, w), (zero,), (v,))[:2]
        return (slope * _bent(problem, z, slope)).sum()

    def loss(v: Tensor) -> Tensor:
        return problem.total_loss(problem.outputs(block, v))

    def hessian_entry(v: Tensor) -> Tensor:
        return v @ vjp(grad(loss), zero)[1](v)[0]

    entry = ggn_entry if of == "ggn" else hessian_entry
    check_agreement(
        f"diagonal of the {of}", block, found[places], vmap(entry)(directions) / problem.n
    )


def _random(like: Tensor) -> Tensor:
    """Random direction, the same for the same size."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _pushed(problem: Problem, block: Block, u: Tensor) -> Tensor:
    """Jacobian product J u, shaped like the outputs."""
    return jvp(lambda v: problem.outputs(block, v), (torch.zeros_like(u),), (u,))[1]


def _bent(problem: Problem, z: Tensor, slope: Tensor) -> Tensor:
    """Hessian of the summed loss w.r.t. the outputs z, times a direction of their shape."""
    product: Tensor = vjp(grad(problem.total_loss), z)[1](slope)[0]
    return product
