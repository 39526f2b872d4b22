"""TKFAC: one Kronecker product per Fisher block, with the block's own trace."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from torch import Tensor

from ...blocks.blocks import Block
from ...capture.capture import Accumulate, Totals
from ...capture.per_example import examples_of
from ...core.base import Live
from ...core.fisher import FisherOptimizer, kronecker
from ...core.inversions import Job
from ...core.kronecker_factors import learn_moments, warm_moments
from ...core.stacks import Stack
from ...linalg.operators import Operator
from ...linalg.products import sandwich
from .formulas import balanced_inverse, moments, trace


class TKFAC(FisherOptimizer):
    """Kronecker-factored curvature of the right trace: W_bar <- W_bar - lr L_inv M R_inv.

    The curvature is L ⊗ R / δ with L = E_n[V_n V_nᵀ], R = E_n[V_nᵀ V_n], V_n the gradient of one
    example, summed over its positions; δ = tr L = tr R is the trace of the Fisher block, and so is
    that of the product. With one position L = E[‖ã‖² g gᵀ], R = E[‖g‖² ã ãᵀ], δ = E[‖ã‖² ‖g‖²].
    For the step δ is shared out so that both factors have the same mean eigenvalue, i = in+1:
    L_inv = (√(out / (i δ)) L + √damping I)⁻¹, R_inv = (√(i / (out δ)) R + √damping I)⁻¹.
    L and R are running averages; M is an average. On update steps layer inputs and their
    gradients, of all micro-batches, are kept until the step.

    State of each weight: L, L_inv [out, out]; R, R_inv [in+1, in+1].
    Source: Gao et al. 2020, arXiv:2011.10741, for the idea; how δ and the damping are shared out,
    several positions, lr and damping (KFAC's) are our choice.
    """

    def curvature(self) -> dict[str, Operator]:
        """{module name: L ⊗ (R / δ)}, the undamped Fisher blocks."""
        return self._operators(
            lambda stack, block: kronecker(stack, block, stack["L"], stack["R"] / trace(stack["R"]))
        )

    def _accumulate(self) -> Accumulate:
        return examples_of(self._harness.setting("likelihood"))

    def _learn(self, live: Live) -> None:
        def learn(stack: Stack, totals: dict[Block, Totals]) -> Tensor:
            new, weight = moments(stack, totals, scale), 1 - stack.group["decay"]
            return learn_moments(stack, stack.mask(totals), weight, **new)

        scale = self._harness.sum_scale
        self._learn_by(live, learn)

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        def average(stack: Stack, totals: dict[Block, Totals], batch: int) -> None:
            warm_moments(stack, batch, **moments(stack, totals, self._harness.sum_scale))

        self._average_by(closures, self._accumulate(), average)

    def _inversions(self, stack: Stack) -> tuple[Job, ...]:
        (out, columns), root = stack.shape, stack.group["damping"] ** 0.5
        left = partial(balanced_inverse, ratio=out / columns)
        right = partial(balanced_inverse, ratio=columns / out)
        return Job(stack, "L", "L_inv", left, root), Job(stack, "R", "R_inv", right, root)

    def _direction(self, stack: Stack) -> Tensor:
        return sandwich(stack["L_inv"], stack["momentum"], stack["R_inv"])

    def _operator(self, stack: Stack, block: Block) -> Operator:
        """L_inv ⊗ R_inv."""
        return kronecker(stack, block, stack["L_inv"], stack["R_inv"])
