"""KFAC: Fisher blocks G ⊗ A, inverted factor by factor."""

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor

from ...blocks.blocks import Block
from ...capture.capture import Accumulate
from ...core.base import Live
from ...core.fisher import FisherOptimizer, kronecker
from ...core.inversions import Job
from ...core.kronecker_factors import factors_of, learn_factors, warm_factors
from ...core.stacks import Stack
from ...linalg.basics import damped_inverse
from ...linalg.operators import Operator
from ...linalg.products import sandwich


class KFAC(FisherOptimizer):
    """Kronecker-factored curvature: W_bar <- W_bar - lr G_inv M A_inv, per Linear and Conv2d.

    G_inv = (G + √damping I)⁻¹, A_inv = (A + √damping I)⁻¹. A and G are running averages of the
    second moments of layer inputs and of gradients w.r.t. layer outputs; where weights are shared
    over positions A sums over them and G is their mean. M is an average. `KFAC2015` has the
    published rescaling, momentum and adaptive damping.

    State of each weight: A, A_inv [in+1, in+1]; G, G_inv [out, out].
    Source: Martens, Grosse 2015, arXiv:1503.05671, sections 3-5, in the form that the published
    code of arXiv:2006.08877 compares with; convolutions: Grosse, Martens 2016, arXiv:1602.01407.

        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Linear(3, 2)
        >>> x, t = torch.randn(8, 3), torch.randn(8, 2)
        >>> opt = KFAC(model, lr=0.1, damping=0.1, likelihood="gaussian")
        >>> losses = []
        >>> for _ in range(20):
        ...     opt.zero_grad()
        ...     loss = 0.5 * (model(x) - t).square().sum(1).mean()
        ...     loss.backward()
        ...     _ = opt.step()
        ...     losses.append(loss.item())
        >>> losses[-1] < losses[0]
        True
    """

    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "growing_decay": (False, "use KFAC2015"),
        "pi": (False, "use KFAC2015"),
        "rescale": (False, "use KFAC2015"),
        "adaptive": (None, "use KFAC2015"),
    }

    def curvature(self) -> dict[str, Operator]:
        """{module name: G ⊗ A}, the undamped Fisher blocks, live views."""
        return self._operators(lambda stack, block: kronecker(stack, block, stack["G"], stack["A"]))

    def _accumulate(self) -> Accumulate:
        return factors_of(self._harness.setting("likelihood"))

    def _learn(self, live: Live) -> None:
        scale = self._harness.scale
        self._learn_by(live, lambda stack, totals: learn_factors(stack, totals, scale))

    def _warm_up(self, closures: Iterable[Callable[[], Any]]) -> None:
        self._average_by(closures, self._accumulate(), warm_factors)

    def _inversions(self, stack: Stack) -> tuple[Job, ...]:
        root = stack.group["damping"] ** 0.5
        return tuple(Job(stack, M, f"{M}_inv", damped_inverse, root) for M in "AG")

    def _direction(self, stack: Stack) -> Tensor:
        return sandwich(stack["G_inv"], stack["momentum"], stack["A_inv"])

    def _operator(self, stack: Stack, block: Block) -> Operator:
        """G_inv ⊗ A_inv."""
        return kronecker(stack, block, stack["G_inv"], stack["A_inv"])
