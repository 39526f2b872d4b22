"""Shampoo: each axis of a parameter preconditioned by a root of its gradient covariance."""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, ClassVar

from torch import Tensor, nn

from ...blocks.blocks import Block
from ...core import axes
from ...core.base import CurvatureOptimizer, Live
from ...core.distributed import Solver
from ...core.inversions import Job
from ...core.stacks import Stack
from ...core.warm_up import warm_gradients
from ...linalg.operators import Operator
from .roots import inverse_root, root


@cache
def root_solver(p: int) -> Solver:
    """(M, damping) -> (M + damping I)^(-1/p); one object for each p, so that jobs go together."""
    return partial(inverse_root, p=p)


class Shampoo(CurvatureOptimizer):
    """Inverse roots on each axis: W <- W - lr L_root M R_root, for every parameter by itself.

    L_root = (L + damping I)^(-1/4), R_root likewise; L and R are running averages of ∇ ∇ᵀ and
    ∇ᵀ ∇, ∇ the mini-batch gradient. In general H_i on axis i of k axes has the exponent -1/(2k).
    A convolution's weight has three axes, (O, I/groups, kh*kw); biases, norms and whatever is no
    matrix have one. Axes longer than 8192 get no matrix and do not count in k; a parameter with
    such axes only takes lr M; `summary()` says which.

    Momentum is a heavy ball, weight_decay decoupled unless
    decoupled_weight_decay=False. Roots are refreshed at each multiple of refresh_every, step 0
    included.

    refresh_early: new roots at each update of H_i before step `refresh_every` too, as the
        published code has them for CNNs.

    State of each parameter: H_1, H_2, ... and root_1, root_2, ... [n_i, n_i].
    Raises: ValueError for a sparse gradient.
    Source: Gupta, Koren, Singer 2018, arXiv:1802.09568; averages, flattening and
    defaults as in the published code of arXiv:2106.02925 (MNIST autoencoder, loss summed over 784
    pixels).
    """

    heavy_ball = True
    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "sums": (False, "Shampoo has running averages only"),
        "join_bias": (False, "Shampoo has each parameter by itself"),
        "max_axis": (8192, axes.FIXED),
    }

    def __init__(
        self,
        model: nn.Module,
        lr: float = 3e-4,
        damping: float = 3e-4,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        refresh_early: bool = False,
        stagger: bool = False,
        decoupled_weight_decay: bool = True,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals(), axes.variables)

    def curvature(self) -> dict[str, Operator]:
        """{parameter name: L^(1/4) ⊗ R^(1/4)}, the undamped inverse of the preconditioner; copies.

        Made by eigenvalues at each call. Its square, not itself, bounds the second moment of the
        mini-batch gradient.
        """
        return self._operators(
            lambda s, b: axes.operator(s, lambda i: root(s.of(b, f"H_{i + 1}"), _power(s))[0])
        )

    @property
    def _all_until(self) -> int:
        setting = self._harness.setting
        return setting("refresh_every") if setting("refresh_early") else 1

    def _learn(self, live: Live) -> None:
        harness = self._harness
        for stack, blocks in live.items():
            # what warm_up began rests once, its batches being about the same as this one
            if harness.updating and not (harness.step == 0 and stack.started):
                axes.learn(harness, stack, blocks, harness.gradient(stack, blocks))
        self._ready(live)

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        axes.warm(self._harness, warm_gradients(self._harness, closures, decay=True))
        self._refresh()

    def _inversions(self, stack: Stack) -> list[Job]:
        solver, damping = root_solver(_power(stack)), stack.group["damping"]
        held = axes.names(stack, "H").items()
        return [Job(stack, name, f"root_{i + 1}", solver, damping) for i, name in held]

    def _direction(self, stack: Stack) -> Tensor:
        return axes.applied(stack, "root", stack["momentum"])

    def _operator(self, stack: Stack, block: Block) -> Operator | None:
        return axes.operator(stack, lambda i: stack.of(block, f"root_{i + 1}")[0])


def _power(stack: Stack) -> int:
    """Twice the number of axes with a matrix."""
    return 2 * len(axes.axes_of(stack))
