"""Mean over examples of the squared entries of each example's own gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from ...core import distributed
from .jacobians import Piece, output_at
from .options import DiagonalPreconditioner

NO_VMAP = (
    "DiagonalPreconditioner takes the gradient of each example of {} by torch.func.vmap, which not "
    "every layer allows; leave it out"
)


def mean_squares(
    pieces: Sequence[Piece],
    parts: Sequence[Sequence[Tensor]],
    batch: int,
    preconditioner: DiagonalPreconditioner,
) -> list[list[Tensor]]:
    """(1/m) Σ_n ∇ℓ_n ∘ ∇ℓ_n over the m examples of the pieces, for each part.

    batch: examples of the loss whose gradient by the output the pieces hold, a mean over them.
    """
    examples = distributed.summed(sum(piece.examples for piece in pieces), parts[0][0].device)
    found = []
    for part in parts:
        sums = [sum_of_squares(piece, part, preconditioner.at_once) for piece in pieces]
        total = [torch.stack(own).sum(0) * (batch**2 / examples) for own in zip(*sums, strict=True)]
        distributed.add_up_(*total)
        found.append(total)
    return found


def sum_of_squares(piece: Piece, part: Sequence[Tensor], at_once: int) -> list[Tensor]:
    """Σ_n g_n ∘ g_n, like the parameters; g_n = J_nᵀ w_n with w = piece.gradient.

    at_once: gradients of so many examples are held at a time.

    Raises: RuntimeError for a layer that torch.func.vmap cannot batch.
    """
    inputs = (piece.args, piece.kwargs, piece.gradient)
    axes = _each(inputs, lambda t: 0 if t.ndim and len(t) == piece.examples else None)

    def slope(values: tuple[Tensor, ...], one: Any) -> Tensor:
        args, kwargs, w = _each(one, _as_batch, axes)
        return (
            output_at(piece.model, dict(zip(part, values, strict=True)), args, kwargs) * w
        ).sum()

    each = vmap(grad(slope), in_dims=(None, axes), randomness="different")
    values = tuple(p.detach() for p in part)
    total = [torch.zeros_like(p) for p in part]
    for rows in torch.arange(piece.examples, device=values[0].device).split(at_once):
        some = _each(inputs, lambda t, axis, rows=rows: t if axis is None else t[rows], axes)
        try:
            found = each(values, some)
        except RuntimeError as error:
            error.add_note(NO_VMAP.format(type(piece.model).__name__))
            raise
        for sum_, g in zip(total, found, strict=True):
            sum_ += g.square().sum(0)
    return total


def _as_batch(t: Tensor, axis: int | None) -> Tensor:
    return t if axis is None else t[None]


def _each(value: Any, function: Callable[..., Any], *beside: Any) -> Any:
    """function(tensor, what stands beside it) for the tensors in nested containers."""
    if isinstance(value, Tensor):
        return function(value, *beside)
    if isinstance(value, dict):
        return {k: _each(v, function, *(b[k] for b in beside)) for k, v in value.items()}
    if type(value) in (list, tuple):
        pairs = zip(value, *beside, strict=True)
        return type(value)(_each(v, function, *others) for v, *others in pairs)
    return None if not beside else value
