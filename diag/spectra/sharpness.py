"""Preconditioned sharpness λ_max(P C), from products with C and P, and its stability limit.

Lanczos in the inner product of P⁻¹ keeps w_j and u_j = P w_j with w_i · u_j = δ_ij, and
T_ij = u_i · C u_j.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..operators import Operator, like
from ..operators.structures import Map
from .preconditioned import NotPositiveDefiniteError

SPACE = 12  # vectors kept, from whose best combination a restart goes on


class NotFiniteError(ValueError):
    """Raised where a product with the curvature or the preconditioner is not finite."""


class Sharpest(NamedTuple):
    """Greatest eigenvalue of P C, its u [d] with u · P⁻¹u = 1, and the dual P⁻¹u [d].

    residual: ‖P C u − value u‖ in the norm of P⁻¹, a bound of the value's error. products: number
    of products with C and P.
    """

    value: float
    vector: Tensor
    dual: Tensor
    residual: float
    products: int


def sharpest(
    curvature: Operator,
    precondition: Map,
    start: Tensor | None = None,
    tolerance: float = 1e-3,
    products: int = 200,
) -> Sharpest:
    """The algebraically greatest eigenvalue of P C for a symmetric C.

    precondition: v [d] -> P v, symmetric and positive definite. start: a guess of P⁻¹u such as
    `dual` of the step before, default random. tolerance: of the residual, relative to the greatest
    |eigenvalue|. products: at most.

    Raises: NotPositiveDefiniteError or NotFiniteError (ValueErrors), found on the vectors met.
    Source: Parlett 1998, "The symmetric eigenvalue problem", chapter 15 (Lanczos for a pair); as a
    measure of stability Cohen et al. 2022, arXiv:2207.14484 ("preconditioned sharpness").

    >>> from kronscope.diag.operators import Diagonal
    >>> C, P = Diagonal(torch.tensor([3.0, 1.0, -9.0])), Diagonal(torch.tensor([1.0, 5.0, 1.0]))
    >>> round(sharpest(C, lambda v: P @ v).value, 6)
    5.0
    """
    entries = like(curvature)
    if start is None:
        generator = torch.Generator().manual_seed(curvature.shape[0])
        start = torch.randn(curvature.shape[0], generator=generator, dtype=entries.dtype)
    w, spent = start.to(entries), 0
    while True:
        found, more = _space(curvature, precondition, w, tolerance, products - spent)
        spent += found.products
        if not more or spent >= products:
            return found._replace(products=spent)
        w = found.dual


def side_by_side(operators: Sequence[Operator]) -> Map:
    """The block-diagonal map v [d] -> products of operators with its parts, for `sharpest`.

    >>> from kronscope.diag.operators import Diagonal
    >>> P = side_by_side([Diagonal(torch.tensor([2.0])), Diagonal(torch.tensor([3.0, 4.0]))])
    >>> P(torch.ones(3)).tolist()
    [2.0, 3.0, 4.0]
    """
    sizes = [operator.shape[0] for operator in operators]

    def apply(v: Tensor) -> Tensor:
        return torch.cat([P @ part for P, part in zip(operators, v.split(sizes), strict=True)])

    return apply


def _space(
    curvature: Operator,
    precondition: Map,
    w: Tensor,
    tolerance: float,
    products: int,
) -> tuple[Sharpest, bool]:
    """The best of one Krylov space, and whether it needs a restart."""
    duals, vectors, T = [], [], torch.zeros(SPACE, SPACE, dtype=torch.float64)
    u = precondition(w)
    length = _length(w, u)
    for k in range(min(SPACE, products)):
        duals.append(w / length)
        vectors.append(u / length)
        w = curvature @ vectors[-1]
        for _ in range(2):  # once is not enough where the new part is small
            for j in range(k + 1):
                share = vectors[j] @ w
                w = w - share * duals[j]
                T[j, k] += share.double().cpu()
        u = precondition(w)
        length = _length(w, u)
        upper = T[: k + 1, : k + 1].triu()
        values, turns = torch.linalg.eigh(upper + upper.triu(1).T)
        residual = length * abs(turns[-1, -1].item())
        close = residual <= tolerance * values.abs().max().item()
        if close:
            break
    weights = turns[:, -1].to(w)
    vector, dual = (torch.stack(own, 1) @ weights for own in (vectors, duals))
    return Sharpest(values[-1].item(), vector, dual, residual, len(duals)), not close


def _length(w: Tensor, u: Tensor) -> float:
    """√(w · P w)."""
    square = (w @ u).item()
    if not math.isfinite(square):
        raise NotFiniteError(
            f"w · P w = {square}: the curvature or the preconditioner is not finite"
        )
    if square < 0:
        raise NotPositiveDefiniteError(f"the preconditioner (w · P w = {square:.3g})")
    return math.sqrt(square)


def stability_limit(momentum: float) -> float:
    """Greatest stable lr · λ_max(P C) of averaged momentum on a quadratic, 2 (1 + β) / (1 − β).

    For m <- β m + (1 − β) g, θ <- θ − lr P m; (1 − β) times that for heavy ball, m <- β m + g.

    Raises: ValueError for a momentum outside [0, 1).
    Source: the roots of z² − (1 + β − (1 − β) lr λ) z + β leave the unit disc at z = −1
    (Polyak 1964); derived.

    >>> round(stability_limit(0.0), 6), round(stability_limit(0.9), 6)
    (2.0, 38.0)
    """
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1), not {momentum}")
    return 2 * (1 + momentum) / (1 - momentum)
