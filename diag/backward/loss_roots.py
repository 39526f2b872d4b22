"""Square-root factors of the loss Hessian (GGN) or Fisher with respect to the model outputs.

H_n = Σ_k r_nk r_nkᵀ; back-propagated, the r_nk become the columns of a block's own root.
"""

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from ..operators.batched import Diagonals, Outer
from ..operators.structures import Map
from ..problem.problem import Problem
from .likelihoods import likelihood_of

RANK_EPSILONS = 50  # times eps and the largest eigenvalue: smaller eigenvalues are rounding


def loss_roots(
    problem: Problem, of: str, samples: int = 1, generator: torch.Generator | None = None
) -> Diagonals | Outer | None:
    """Roots of every H_n over the flattened outputs: Diagonals [N, c] or Outer [N, k, c].

    of: "ggn", "fisher", "fisher_mc" or "empirical_fisher". None for a loss not convex in the
    outputs, whose GGN has no real root.

    Raises: ValueError for a Fisher of a loss without a known likelihood.
    """
    with torch.no_grad():
        z = problem.model(problem.inputs)
    if of == "empirical_fisher":
        return Outer(grad(problem.total_loss)(z).reshape(len(z), 1, -1))
    if of == "fisher_mc":
        likelihood, scale = likelihood_of(problem)
        assert generator is not None
        drawn = [likelihood.score(z, likelihood.sample(z, generator)) for _ in range(samples)]
        scores = (scale / samples) ** 0.5 * torch.stack(drawn)  # of second moment scale · Fisher
        return Outer(scores.reshape(samples, len(z), -1).movedim(0, 1))
    return _from_products(problem, z, of)


def output_curvature(problem: Problem, z: Tensor, of: str) -> Map:
    """The map u -> loss Hessian ("ggn") or Fisher ("fisher") at the outputs z times u, like z."""
    if of == "fisher":
        likelihood, scale = likelihood_of(problem)
        return lambda u: scale * likelihood.fisher(z, u)
    pull = vjp(grad(problem.total_loss), z)[1]
    return lambda u: pull(u)[0]


def _from_products(problem: Problem, z: Tensor, of: str) -> Diagonals | Outer | None:
    bend = output_curvature(problem, z, of)
    diagonal = _if_diagonal(bend, z)
    if diagonal is not None:
        return Diagonals(diagonal) if (diagonal >= 0).all() else None
    return _factorised(bend, z)


def _if_diagonal(bend: Map, z: Tensor) -> Tensor | None:
    """The diagonal [N, c] where H is diagonal, told from products with two random vectors."""
    generator = torch.Generator().manual_seed(z.numel())
    probes = 1 + torch.rand(2, *z.shape, generator=generator, dtype=torch.float64)
    first, second = ((bend(u) / u).reshape(len(z), -1) for u in probes.to(z))
    slack = 100 * torch.finfo(z.dtype).eps * first.abs().max()
    if (first - second).abs().max() > slack:
        return None
    return bend(torch.ones_like(z)).reshape(len(z), -1)


def _factorised(bend: Map, z: Tensor) -> Outer | None:
    """Roots [N, k, c] from the eigenvectors of every H_n with nonzero eigenvalues."""
    c = z[0].numel()
    directions = torch.eye(c).to(z).reshape(c, 1, *z.shape[1:]).expand(c, *z.shape)
    H = vmap(bend)(directions).reshape(c, len(z), c).movedim(0, 1).double()  # [N, c, c]
    values, vectors = torch.linalg.eigh((H + H.mT) / 2)
    noise = RANK_EPSILONS * torch.finfo(z.dtype).eps * float(values.abs().max())
    if values.min() < -noise:
        return None
    some = values.amax(0) > noise  # [c]: ascending, so the same places for all examples
    roots = values[:, some].clamp(min=0).sqrt()[:, :, None] * vectors[:, :, some].mT
    return Outer(roots.to(z))
