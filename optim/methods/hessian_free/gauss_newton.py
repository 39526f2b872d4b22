"""Products with diagonal blocks of the Gauss-Newton matrix of a batch, matrix-free."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ...capture.likelihoods import FISHER, fits
from ...core import distributed
from .jacobians import Piece, Route, choose_route


class GaussNewton:
    """G = (1/m) Σ_n J_nᵀ H_n J_n of a curvature batch, H_n the loss Hessian at example n's outputs.

    pieces: the model calls that make up the batch. parts: the parameters of each block b; G_bb v
    is the b-part of G times v placed in b. likelihood: the loss is its negative logarithm. route:
    how J v is computed; None tries.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        parts: Sequence[Sequence[Tensor]],
        likelihood: str,
        route: Route | None = None,
    ) -> None:
        self._parts, self._loss_hessian = parts, FISHER[likelihood]
        self.route = choose_route(pieces[0], parts) if route is None else route
        self._jacobians = [self.route(piece, parts) for piece in pieces]
        fits(likelihood, self._jacobians[0].output)
        self.examples = distributed.summed(
            sum(piece.examples for piece in pieces), self._jacobians[0].output.device
        )

    def products(self, numbers: Sequence[int], v: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """G_bb v_b of the blocks with these numbers, each in the shapes of its parameters."""
        return [self._product(b, one) for b, one in zip(numbers, v, strict=True)]

    def _product(self, part: int, v: Sequence[Tensor]) -> list[Tensor]:
        cast = [one.to(p.dtype) for one, p in zip(v, self._parts[part], strict=True)]
        total: list[Tensor] = []
        for jacobian in self._jacobians:
            u = jacobian.forward(part, cast)
            wide = torch.promote_types(u.dtype, torch.float32)
            w = self._loss_hessian(jacobian.output.to(wide), u.to(wide)) / self.examples
            found = jacobian.back(part, w.to(u.dtype))
            total = [a + b for a, b in zip(total, found, strict=True)] if total else list(found)
        distributed.add_up_(*total)
        return total
