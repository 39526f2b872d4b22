"""The quadratic model M(v) = ∇ᵀv + ½ vᵀ(F + L2 + λI)v of a step, and its minimum in a plane.

F = (1/m) Σ_n J_nᵀ H_n J_n is the batch's exact Fisher (arXiv:1503.05671, sections 6.4 and 7).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...capture import closures
from ...capture.closures import RandomState, full_precision
from ...capture.likelihoods import FISHER
from ...capture.output_jacobian import OutputJacobian
from ...core.harness import Harness

NO_OUTPUT = (
    "KFAC2015 measures the Fisher matrix at the model's output: the closure must call the "
    "model itself, not its parts, and then backward"
)


class FisherProducts:
    """A forward hook of the model: v_iᵀ F v_j [k, k] over the examples whose backward comes.

    The output is handed on without its graph: the closure's backward ends there at once.
    """

    def __init__(
        self,
        likelihood: str,
        parameters: Sequence[Tensor],
        directions: Sequence[Sequence[Tensor]],
    ) -> None:
        self._fisher = FISHER[likelihood]
        self._parameters, self._directions = parameters, directions
        self._seen: dict[int, tuple[int, Tensor]] = {}
        self._forward = 0

    def __call__(self, _: nn.Module, __: Any, output: Any) -> Tensor | None:
        """The output without its graph, if there is one."""
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad):
            return None
        jacobian = OutputJacobian(output, [self._parameters])
        if not jacobian.reaches:
            raise ValueError(NO_OUTPUT)
        dtypes = [p.dtype for p in self._parameters]
        casts = [[one.to(t) for one, t in zip(v, dtypes, strict=True)] for v in self._directions]
        us = [jacobian.forward(0, v) for v in casts]
        with torch.no_grad(), full_precision(output.device):
            wide = torch.promote_types(output.dtype, torch.float32)
            at = output.detach().to(wide)
            Hu = torch.stack([self._fisher(at, u.to(wide)).reshape(-1) for u in us])
            U = torch.stack([u.reshape(-1) for u in us])
            total = len(output), U.double() @ Hu.double().T
        self._forward += 1
        number = self._forward
        # a forward without a backward does not count, two backwards through one count once
        return closures.cut(output, lambda _: self._seen.__setitem__(number, total))

    @property
    def result(self) -> Tensor:
        """v_iᵀ F v_j. Raises: ValueError if there was no output with a backward."""
        if not self._seen:
            raise ValueError(NO_OUTPUT)
        counts, totals = zip(*self._seen.values(), strict=True)
        return torch.stack(totals).sum(0) / sum(counts)


def run_again(
    harness: Harness,
    closure: Callable[[], Tensor],
    start: RandomState,
    hook: Callable[[nn.Module, tuple[Any, ...], Any], Tensor | None],
) -> Tensor:
    """As `closures.run_again`; statistics are not gathered."""
    with harness.capture.recording(None):
        return closures.run_again(harness.model, closure, start, hook)


class Quadratic(NamedTuple):
    """M(Σ c_i v_i), float64: slope [k] of ∇ + τθ, of which pull [k] of τθ; the others [k, k]."""

    slope: Tensor
    pull: Tensor
    fisher: Tensor
    l2: Tensor
    damping: Tensor

    @property
    def damped(self) -> Tensor:
        """V ᵀ(F + τ + λ)V [k, k], what a step is chosen by."""
        return self.fisher + self.l2 + self.damping

    def predicted(self, c: Tensor) -> Tensor:
        """Change of loss and L2 term that the model without λ expects, 0-d."""
        return self.slope @ c + 0.5 * c @ (self.fisher + self.l2) @ c

    def l2_change(self, c: Tensor) -> Tensor:
        """Change of Σ τ/2 ‖θ‖², 0-d."""
        return self.pull @ c + 0.5 * c @ self.l2 @ c


def best_in_plane(slope: Tensor, Q: Tensor, precision: torch.dtype) -> Tensor:
    """The c [2] that minimises slope·c + ½ cᵀQc, Q [2, 2] known to `precision`.

    A direction that is zero gets 0; two that are the same to rounding share one minimum.

    By hand, along the first direction alone:
        >>> slope, Q = torch.tensor([-1.0, 0.0]), torch.diag(torch.tensor([4.0, 0.0]))
        >>> best_in_plane(slope, Q, Q.dtype)[0].item()
        0.25
    """
    diagonal = Q.diagonal()
    # directions scaled to ½ vᵀQv = ½: Q becomes [[1, r], [r, 1]] with eigenvalues 1 ± r
    d = torch.where(diagonal > 0, diagonal.rsqrt(), diagonal * 0)
    x, y = (d * slope).unbind()
    r = d[0] * Q[0, 1] * d[1]
    cutoff = 8 * torch.finfo(precision).eps
    along = torch.where(1 + r < cutoff, 0.0, (x + y) / (1 + r))
    across = torch.where(1 - r < cutoff, 0.0, (x - y) / (1 - r))
    return -0.5 * d * torch.stack([along + across, along - across])
