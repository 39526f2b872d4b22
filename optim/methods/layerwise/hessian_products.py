"""Slope and curvature of the loss along a step, layer by layer, measured in a closure."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...blocks.blocks import Layer

Directions = dict[Tensor, Tensor]


def products(layer: Layer, gradients: dict[Tensor, Tensor], d: Directions) -> Tensor:
    """Slope and curvature [⟨g, d⟩, dᵀ H_ll d] of a layer, from gradients that carry a graph.

    H_ll is the layer's own Hessian block: H_ll d_l is the gradient of ⟨g_l, d_l⟩ in θ_l alone.
    """
    own = [p for p in layer.parameters if p in d]
    reached = [p for p in own if p in gradients]
    curved = [p for p in reached if gradients[p].requires_grad]
    total = d[own[0]].new_zeros(2)
    for p in reached:
        total[0] += (gradients[p].detach() * d[p]).sum()
    if curved:
        Hd = torch.autograd.grad(
            [gradients[p] for p in curved],
            curved,
            [d[p].to(gradients[p].dtype) for p in curved],
            retain_graph=True,
            materialize_grads=True,
        )
        for p, product in zip(curved, Hd, strict=True):
            total[1] += (product * d[p]).sum()
    return total


class ProductsOfBackward(TorchFunctionMode):
    """Context in which loss.backward() adds each layer's `products` to `pairs`, not to .grad.

    directions: d of the parameters that move; `pairs` is empty until the first backward.
    """

    def __init__(self, layers: Sequence[Layer], directions: Directions) -> None:
        super().__init__()
        self.pairs: list[Tensor] = []
        self._layers = layers
        self._directions = directions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Replace Tensor.backward, and call all other functions."""
        run_it = self._backward if func is torch.Tensor.backward else func
        return run_it(*args, **(kwargs or {}))

    def _backward(
        self,
        loss: Tensor,
        gradient: Tensor | None = None,
        inputs: Tensor | Sequence[Tensor] | None = None,
        **_: Any,
    ) -> None:
        moving = [p for x in self._layers for p in x.parameters if p in self._directions]
        asked = (
            {inputs} if isinstance(inputs, Tensor) else set(moving if inputs is None else inputs)
        )
        wanted = [p for p in moving if p in asked and p.requires_grad]
        found: Sequence[Tensor | None] = ()
        if wanted:
            # create_graph keeps the graph too: the closure may go through it a second time
            found = torch.autograd.grad(
                loss, wanted, gradient, create_graph=True, allow_unused=True
            )
        gradients = {p: g for p, g in zip(wanted, found, strict=True) if g is not None}
        new = [products(layer, gradients, self._directions) for layer in self._layers]
        self.pairs = [a + b for a, b in zip(self.pairs, new, strict=True)] if self.pairs else new
