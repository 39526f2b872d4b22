"""Leading singular triples of a map known by its products, by Golub-Kahan-Lanczos."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..operators.structures import Map

MOST_STEPS = 300


class Triples(NamedTuple):
    """Singular values [r] descending, left [r, m] and right [r, n] vectors, residuals [r]."""

    values: Tensor
    left: Tensor
    right: Tensor
    residuals: Tensor


def leading_triples(
    forward: Map, backward: Map, start: Tensor, rank: int, tolerance: float
) -> Triples:
    """The `rank` greatest singular triples of `forward`, [n] -> [m]; `backward` is its transpose.

    One product with each a step, fully re-orthogonalised, until every residual ‖Aᵀu − σv‖ is below
    tolerance times the greatest value. A map of lower rank gives fewer triples, a repeated value
    exactly one.

    Raises: RuntimeError when MOST_STEPS are not enough.
    Source: Golub and Van Loan 2013, section 10.4.
    """
    rights: list[Tensor] = [start / start.norm()]
    lefts, alphas, betas = list[Tensor](), list[Tensor](), list[Tensor]()
    for _ in range(MOST_STEPS):
        u = forward(rights[-1])
        if lefts:
            u = u - betas[-1] * lefts[-1]
        u = orthogonal(u, lefts)
        alphas.append(u.norm())
        lefts.append(u / alphas[-1].clamp(min=torch.finfo(u.dtype).tiny))
        v = orthogonal(backward(lefts[-1]) - alphas[-1] * rights[-1], rights)
        betas.append(v.norm())
        found = _ritz(alphas, betas, rank)
        floor = 100 * torch.finfo(v.dtype).eps * found.values[0]
        if betas[-1] <= floor or (
            len(found.values) == rank and found.residuals.max() <= tolerance * found.values[0]
        ):
            left, right = found.left @ torch.stack(lefts), found.right @ torch.stack(rights)
            return found._replace(left=left, right=right)
        rights.append(v / betas[-1])
    raise RuntimeError(
        f"{MOST_STEPS} Lanczos steps left a residual of {found.residuals.max():.2g} among the "
        f"{rank} leading singular triples; ask for fewer, or decompose the dense block"
    )


def orthogonal(vector: Tensor, basis: list[Tensor]) -> Tensor:
    """Component of a vector orthogonal to an orthonormal basis, projected twice for accuracy."""
    for _ in range(2 if basis else 0):
        known = torch.stack(basis)
        vector = vector - known.T @ (known @ vector)
    return vector


def _ritz(alphas: list[Tensor], betas: list[Tensor], rank: int) -> Triples:
    """Singular triples of the bidiagonal matrix so far, with residuals ‖Aᵀu − σv‖."""
    small = torch.diag(torch.stack(alphas))
    if len(alphas) > 1:
        small = small + torch.diag(torch.stack(betas[:-1]), 1)
    left, values, right = torch.linalg.svd(small)
    residuals = betas[-1] * left[-1].abs()
    return Triples(values[:rank], left.T[:rank], right[:rank], residuals[:rank])
