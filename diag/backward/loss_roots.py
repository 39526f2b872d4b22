"""Square roots of what bends the loss at the outputs: the vectors every GGN and Fisher starts from.

A curvature of the outputs is H_n = Σ_k r_nk r_nkᵀ; back-propagated to a layer or to parameters, the
r_nk become the columns of the block's own root.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from ..operators.batched import Diagonals, Outer
from ..problem.problem import Problem
from .likelihoods import likelihood_of

Map = Callable[[Tensor], Tensor]

RANK_EPSILONS = 50  # epsilons of the largest eigenvalue; what lies below is rounding


def loss_roots(
    problem: Problem, of: str, samples: int = 1, generator: torch.Generator | None = None
) -> Diagonals | Outer | None:
    """H_n of every example as roots over the flattened outputs, values [N, c] or roots [N, k, c].

    of: "ggn", "fisher" (exact expectation), "fisher_mc" (sampled labels) or "empirical_fisher".
    None where the loss is not convex in the outputs, so that its GGN has no real root.

    Raises: ValueError when a Fisher is asked of a loss that belongs to no known likelihood.
    """
    with torch.no_grad():
        z = problem.model(problem.inputs)
    if of == "empirical_fisher":
        return Outer(grad(problem.total_loss)(z).reshape(len(z), 1, -1))
    if of == "fisher_mc":
        scores = _sampled(problem, z, samples, generator).reshape(samples, len(z), -1)
        return Outer(scores.movedim(0, 1))
    return _from_products(problem, z, of)


def _sampled(
    problem: Problem, z: Tensor, samples: int, generator: torch.Generator | None
) -> Tensor:
    """Scores of sampled labels, [samples, N, ...], scaled so that their second moment is s·Fisher.

    s: the loss is s times the negative logarithm of the likelihood.
    """
    likelihood, scale = likelihood_of(problem)
    assert generator is not None
    drawn = [likelihood.score(z, likelihood.sample(z, generator)) for _ in range(samples)]
    return (scale / samples) ** 0.5 * torch.stack(drawn)


def _from_products(problem: Problem, z: Tensor, of: str) -> Diagonals | Outer | None:
    if of == "fisher":
        likelihood, scale = likelihood_of(problem)

        def bend(u: Tensor) -> Tensor:
            return scale * likelihood.fisher(z, u)
    else:
        pull = vjp(grad(problem.total_loss), z)[1]

        def bend(u: Tensor) -> Tensor:
            return pull(u)[0]

    diagonal = _if_diagonal(bend, z)
    if diagonal is not None:
        return Diagonals(diagonal) if (diagonal >= 0).all() else None
    return _factorised(bend, z)


def _if_diagonal(bend: Map, z: Tensor) -> Tensor | None:
    """The diagonal [N, c] of a diagonal H: two vectors without zeros give it away."""
    generator = torch.Generator().manual_seed(z.numel())
    probes = 1 + torch.rand(2, *z.shape, generator=generator, dtype=torch.float64)
    first, second = ((bend(u) / u).reshape(len(z), -1) for u in probes.to(z))
    slack = 100 * torch.finfo(z.dtype).eps * first.abs().max()
    if (first - second).abs().max() > slack:
        return None
    return bend(torch.ones_like(z)).reshape(len(z), -1)


def _factorised(bend: Map, z: Tensor) -> Outer | None:
    """Roots [N, k, c] from the eigenvectors of every H_n, those with no eigenvalue left out."""
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
