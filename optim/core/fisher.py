"""FisherOptimizer: the settings that KFAC and its kin share."""

from typing import Any

from torch import Tensor, nn

from ..blocks.blocks import Block
from ..linalg.operators import Kronecker, Operator, by_group
from .base import CurvatureOptimizer
from .stacks import Stack


class FisherOptimizer(CurvatureOptimizer):
    """Abstract parent of methods that invert running averages of Kronecker factors of the Fisher.

    Defaults: KFAC's in the published code of arXiv:2006.08877 (MNIST autoencoder, loss summed over
    784 pixels).
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 3.0,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        update_every: int = 1,
        refresh_every: int = 20,
        *,
        stagger: bool = False,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(model, groups, locals())


def kronecker(stack: Stack, block: Block, left: Tensor, right: Tensor) -> Operator:
    """The product left ⊗ right of a block, of factors [size, n, n] of its stack."""
    place = stack.places[block]
    return by_group([Kronecker(L, R) for L, R in zip(left[place], right[place], strict=True)])
