"""ExactFisher: each layer's exact Fisher block of the batch, inverted in example space."""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from ...blocks.blocks import Block
from ...capture.capture import Accumulate, Totals
from ...capture.per_example import examples_of
from ...core.base import CurvatureOptimizer, Live
from ...core.stacks import Stack
from ...core.warm_up import warming
from ...linalg.operators import ExampleSum, Operator, Woodbury
from .rows import example_rows, factorization, make_room, room, woodbury


class ExactFisher(CurvatureOptimizer):
    """Exact Fisher blocks of Linear and Conv2d layers: W_bar <- W_bar - lr (F + damping I)⁻¹ M.

    F = (1/m) Σ_n vec V_n (vec V_n)ᵀ with V_n = Σ_t g_nt x̃_ntᵀ the gradient of example n of the last
    batch, summed over positions (and calls) that share the weights; a grouped convolution is one
    block. No approximation but that of one batch and of blocks by layer: the reference others are
    held against. By Woodbury's identity only matrices of the size of the batch are factored:

        (F + damping I)⁻¹ M = (M - Σ_n ζ_n V_n / √m) / damping,
        (K + damping I) ζ = t,  K_nk = ⟨V_n, V_k⟩ / m,  t_n = ⟨V_n, M⟩ / √m.

    There is no running average of F, hence no decay. Between updates the batch of the last one
    serves on, with the damping of then; `warm_up` takes the last of its batches. M is an average.

    damping: of F + damping I. In float32 directions of the batch are resolved to about 1e-7 of
        the largest eigenvalue of F: damping much below that fails.
    update_every: steps between batches whose rows are taken.

    State of each weight: g [m, T, out] (divided by √m), x [m, T, in+1], the rows of the last
    update: memory of m T (out + in + 1) floats a layer, T at most min(out, in+1), since more
    positions are summed into V_n; L [m, m], of K + damping I; the damping in it. m is that of the
    largest batch so far, smaller ones end in zero rows.
    Source: TENGraD, Soori et al. 2022, arXiv:2106.03947, lr and damping as for the MNIST
    autoencoder in its published code (batch 100, loss summed over 784 pixels); F is "Fisher-BD" in
    the published code of arXiv:2106.02925.
    """

    counts = ("updates", "failed inverses", "not finite")

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        damping: float = 3.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        *,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals())

    def curvature(self) -> dict[str, Operator]:
        """{module name: F}, the undamped Fisher blocks of the batch of the last update."""
        return self._operators(_fisher)

    def _accumulate(self) -> Accumulate:
        return examples_of(self._harness.setting("likelihood"))

    def _learn(self, live: Live) -> None:
        if self._harness.capture.accumulate is not None:
            self._take_rows(self._harness.collected(live))
        self._ready(live)

    def _take_rows(self, found: dict[Stack, dict[Block, Totals]]) -> None:
        """Rows of this batch and their L; where that fails the last good ones stay."""
        harness, jobs = self._harness, []
        for stack, totals in found.items():
            harness.start(stack, totals)
            rows = {b: example_rows(b, t, harness.sum_scale) for b, t in totals.items()}
            if (sizes := room(stack, rows)) != room(stack, {}):
                harness.refresher.settle(wait=True)  # failures of the shapes so far
                make_room(stack, *sizes)
            job, ok = factorization(stack, rows)
            mask = stack.mask(totals)
            harness.count(stack, {"updates": ok & mask, "not finite": ~ok & mask})
            jobs.append(job)
        harness.refresher.solve(jobs)

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        last, eager = deque(closures, maxlen=1), not self._harness.delivers
        for _, found in warming(self._harness, last, self._accumulate(), eager=eager):
            with self._harness.exact():
                self._take_rows(found)

    def _direction(self, stack: Stack) -> Tensor:
        return woodbury(stack, stack["momentum"])

    def _operator(self, stack: Stack, block: Block) -> Operator:
        """(F + damping I)⁻¹, live until a batch grows."""
        L, damping = stack.of(block, "L")[0], stack.of(block, "damping")[0]
        return Woodbury(_fisher(stack, block), L, damping)


def _fisher(stack: Stack, block: Block) -> ExampleSum:
    return ExampleSum(stack.of(block, "g"), stack.of(block, "x"))
