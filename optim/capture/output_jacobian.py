"""Products with the Jacobian of a model output by reverse-mode differentiation alone."""

from collections.abc import Sequence

import torch
from torch import Tensor


class OutputJacobian:
    """Jacobian J of an output with respect to parameters, given in parts.

    J v is the gradient in u of ⟨Jᵀu, v⟩; the graph of Jᵀu is built once. The output must carry a
    graph that can be differentiated twice.
    """

    def __init__(self, output: Tensor, parts: Sequence[Sequence[Tensor]]) -> None:
        self._graph, self._parts, self.output = output, parts, output.detach()
        every = [p for part in parts for p in part]
        with torch.enable_grad():
            self._u = torch.zeros_like(output, requires_grad=True)
            slopes = torch.autograd.grad(
                output, every, self._u, create_graph=True, allow_unused=True
            )
        self.reaches = any(slope is not None for slope in slopes)  # any of the parameters
        left = iter(slopes)
        self._slopes = [[next(left) for _ in part] for part in parts]

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, in the shape of the output; v in the shapes and dtypes of the part's parameters."""
        pairs = zip(self._slopes[part], v, strict=True)
        used = [(slope, one) for slope, one in pairs if slope is not None and slope.requires_grad]
        if not used:
            return torch.zeros_like(self.output)
        slopes, directions = zip(*used, strict=True)
        return torch.autograd.grad(slopes, self._u, directions, retain_graph=True)[0]

    def back(self, part: int, w: Tensor) -> Sequence[Tensor]:
        """Jᵀw, in the shapes of the part's parameters; w in the shape of the output."""
        return torch.autograd.grad(
            self._graph, self._parts[part], w, retain_graph=True, materialize_grads=True
        )
