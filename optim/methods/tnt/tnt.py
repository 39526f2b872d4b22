"""TNT: tensor-normal training, the Fisher block of a parameter as a Kronecker product over axes."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ...blocks.blocks import Block
from ...capture.capture import NOT_WARM, Accumulate
from ...capture.sampled_gradients import UNSEEN, add_gradient
from ...core import axes
from ...core.base import CurvatureOptimizer, Live
from ...core.inversions import Job
from ...core.stacks import Stack
from ...core.warm_up import warm_gradients, warming
from ...linalg.operators import Operator
from .covariances import CovarianceInverse, covariance


class TNT(CurvatureOptimizer):
    """Tensor-normal training: W <- W - lr (U_1 + damping I)⁻¹ M (U_2 + damping I)⁻¹.

    For every parameter by itself, of any layer. U_1 ⊗ U_2 is the covariance of a tensor-normal
    model of the mini-batch-mean gradient of sampled labels: H_i, running averages of that gradient
    contracted with itself over all axes but i, scaled so that all U_i have the same mean
    eigenvalue and tr(U_1 ⊗ U_2) = tr H_i. That is the Fisher block divided by the batch size, on
    which lr and damping therefore depend. A convolution's weight has three axes, (O, I/groups,
    kh*kw); biases, norms and whatever is no matrix have one. Axes longer than 8192 get no matrix,
    U_i = I without damping; a parameter with such axes only takes lr M; `summary()` says which.

    Momentum is a heavy ball, weight_decay decoupled unless
    decoupled_weight_decay=False, and never part of the sampled gradients. Inverses are refreshed
    at every one of the first refresh_every steps and then at each multiple of it.

    State of each parameter: H_1, H_2, ... and inverse_1, inverse_2, ... [n_i, n_i].
    Raises: ValueError for a sparse gradient, or one that did not come from a call of the model.
    Source: Ren, Goldfarb 2021, arXiv:2106.02925; defaults as in its published code (MNIST
    autoencoder, loss summed over 784 pixels, batches of 1000).
    """

    heavy_ball = True
    _former: ClassVar[dict[str, tuple[Any, str]]] = {"max_axis": (8192, axes.FIXED)}

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1e-4,
        damping: float = 0.1,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        stagger: bool = False,
        decoupled_weight_decay: bool = True,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals(), axes.variables)

    def curvature(self) -> dict[str, Operator]:
        """{parameter name: U_1 ⊗ U_2}, undamped: the Fisher divided by the batch size; copies."""
        return self._operators(
            lambda s, b: axes.operator(s, lambda i: covariance(s, i)[s.places[b]][0])
        )

    @property
    def _all_until(self) -> int:
        return self._harness.setting("refresh_every")

    def _accumulate(self) -> Accumulate:
        return add_gradient

    def _learn(self, live: Live) -> None:
        if self._harness.updating:
            for stack, G in self._gradients(live, UNSEEN).items():
                axes.learn(self._harness, stack, live[stack], G)
        self._ready(live)

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        axes.warm(self._harness, self._warm_gradients(closures))
        self._refresh()

    def _inversions(self, stack: Stack) -> list[Job]:
        damping = stack.group["damping"]
        solver, jobs = CovarianceInverse(damping), []
        for i, name in axes.names(stack, "H").items():
            shifts = partial(solver.shift, stack, i)
            jobs.append(Job(stack, name, f"inverse_{i + 1}", solver, shifts, setting=damping))
        return jobs

    def _direction(self, stack: Stack) -> Tensor:
        return axes.applied(stack, "inverse", stack["momentum"])

    def _operator(self, stack: Stack, block: Block) -> Operator | None:
        return axes.operator(stack, lambda i: stack.of(block, f"inverse_{i + 1}")[0])

    def _gradients(self, live: Live, missing: str) -> dict[Stack, Tensor]:
        """Mean gradients [size, *shape] of the sampled labels, or of the data's; no decay."""
        harness = self._harness
        if harness.labels is None:
            return {s: harness.gradient(s, blocks, decay=False) for s, blocks in live.items()}
        found = harness.collected(live, missing)
        return {
            stack: stack.gathered(
                {b: t.means["gradient"].reshape(1, *b.shape) for b, t in totals.items()}
            )
            for stack, totals in found.items()
        }

    def _warm_gradients(
        self, closures: Iterable[Callable[[], Any]]
    ) -> Iterator[tuple[int, dict[Stack, Tensor]]]:
        """(1, 2, ...) with the gradients of each closure's batch."""
        harness = self._harness
        if harness.labels is None:
            yield from warm_gradients(harness, closures, decay=False)
            return
        everything = {stack: stack.blocks for stack in harness.stacks}
        for batch, _ in warming(harness, closures, add_gradient, eager=True):
            yield batch, self._gradients(everything, NOT_WARM)
