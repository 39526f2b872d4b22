"""Mean square of per-example gradients over a curvature batch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from ...core import distributed
from .jacobians import Piece, map_leaves, output_at

AT_ONCE = 64  # gradients of examples held at a time
NO_VMAP = (
    "the preconditioner takes the gradient of each example of {} by torch.func.vmap, which does "
    "not support every layer; use HessianFree, which has no preconditioner"
)


def mean_squares(
    pieces: Sequence[Piece], parts: Sequence[Sequence[Tensor]], batch: int
) -> list[list[Tensor]]:
    """(1/m) Σ_n ∇ℓ_n ∘ ∇ℓ_n over the m examples of the pieces, for each part's parameters.

    batch: number of examples whose mean loss gave the pieces' output gradients.
    """
    examples = distributed.summed(sum(piece.examples for piece in pieces), parts[0][0].device)
    found = []
    for part in parts:
        sums = [sum_of_squares(piece, part) for piece in pieces]
        total = [torch.stack(own).sum(0) * (batch**2 / examples) for own in zip(*sums, strict=True)]
        distributed.add_up_(*total)
        found.append(total)
    return found


def sum_of_squares(piece: Piece, part: Sequence[Tensor]) -> list[Tensor]:
    """Σ_n g_n ∘ g_n in the shapes of the parameters; g_n = J_nᵀ w_n with w = piece.gradient.

    Raises: RuntimeError for a layer that torch.func.vmap cannot batch.
    """
    inputs = (piece.args, piece.kwargs, piece.gradient)

    def axis(leaf: Any) -> int | None:
        by_example = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == piece.examples
        return 0 if by_example else None

    axes = map_leaves(axis, inputs)

    def slope(values: tuple[Tensor, ...], one: Any) -> Tensor:
        args, kwargs, w = map_leaves(lambda t, a: t if a is None else t[None], one, axes)
        at = dict(zip(part, values, strict=True))
        return (output_at(piece.model, at, args, kwargs) * w).sum()

    each = vmap(grad(slope), in_dims=(None, axes), randomness="different")
    values = tuple(p.detach() for p in part)
    total = [torch.zeros_like(p) for p in part]
    for rows in torch.arange(piece.examples, device=values[0].device).split(AT_ONCE):
        some = map_leaves(lambda t, a, rows=rows: t if a is None else t[rows], inputs, axes)
        try:
            found = each(values, some)
        except RuntimeError as error:
            error.add_note(NO_VMAP.format(type(piece.model).__name__))
            raise
        for sum_, g in zip(total, found, strict=True):
            sum_ += g.square().sum(0)
    return total
