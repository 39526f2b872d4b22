"""The closure's loss at parameters a step away."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ...capture import closures
from ...linalg.basics import factor_dtype

Step = Sequence[Tensor]  # one tensor for each parameter


class Objective:
    """f(θ + s) = loss + Σ τ/2 ‖θ + s‖², from one more forward of the closure.

    parameters: θ. taus: τ of each. start: the generators before the first call of the closure,
    whose loss was `loss`; the same dropout masks are used. Parameters end as they were.
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
    def at(self, step: Step) -> Tensor:
        """f(θ + s), 0-d float64."""
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
