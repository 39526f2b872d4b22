"""Loss and L2 term of a closure at parameters a step away."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...capture import closures
from ...linalg.basics import factor_dtype


class Objective:
    """f(θ + s) = loss + Σ τ/2 ‖θ + s‖², by one more forward pass of the closure.

    parameters: θ. taus: τ of each. start: generator states before the closure's first call, which
    returned `loss`; dropout masks repeat. Parameters end as they were.
    """

    def __init__(
        self,
        model: nn.Module,
        closure: Callable[[], Tensor],
        start: closures.RandomState,
        loss: Tensor,
        parameters: Sequence[Tensor],
        taus: Sequence[float],
    ) -> None:
        self._model, self._closure, self._start = model, closure, start
        self._parameters, self._taus = list(parameters), list(taus)
        self.here = loss.detach().double() + self._l2()

    @torch.no_grad()
    def at(self, step: Sequence[Tensor]) -> Tensor:
        """f(θ + s), 0-d float64; step: one tensor per parameter."""
        before = [p.clone() for p in self._parameters]
        try:
            for p, s in zip(self._parameters, step, strict=True):
                p.add_(s.to(p.dtype))
            loss = closures.run_again(self._model, self._closure, self._start, closures.cut_output)
            return loss.double() + self._l2()
        finally:
            for p, value in zip(self._parameters, before, strict=True):
                p.copy_(value)

    def _l2(self) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        for p, tau in zip(self._parameters, self._taus, strict=True):
            if tau:
                total += 0.5 * tau * p.detach().to(factor_dtype(p)).square().sum().double()
        return total
