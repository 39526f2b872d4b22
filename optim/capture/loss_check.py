"""Check that the training loss is that of the likelihood whose labels are sampled."""

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .hooks import WeakHook

ZERO = 1e-3  # of the gradient's size: a sum no greater is none
NOT_ZERO = 0.05  # far above what half precision leaves of a sum that is none


class LossWatch:
    """Warns before the first step where loss and likelihood do not fit, then takes itself away.

    Each example's gradient of a cross-entropy over classes sums to zero, since softmax and labels
    both sum to one; that tells it from other losses. Of a gaussian nothing is said, since its
    outputs may be probabilities. state() -> (steps taken, likelihood), as they are now.
    """

    def __init__(self, model: nn.Module, state: Callable[[], tuple[int, str]]) -> None:
        self.state = state
        self._handle = model.register_forward_hook(WeakHook(self, "_model_done"))

    def _model_done(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        if self.state()[0] > 0:
            self._handle.remove()
        elif isinstance(output, Tensor) and output.requires_grad and output.ndim > 1:
            output.register_hook(WeakHook(self, "_delivered"))

    def _delivered(self, gradient: Tensor) -> None:
        step, likelihood = self.state()
        if step > 0:
            return
        self._handle.remove()
        values = gradient.detach().float()
        size, left = values.abs().sum().item(), values.sum(1).abs().sum().item()
        if not 0 < size < float("inf"):
            return
        if likelihood == "categorical" and left > NOT_ZERO * size:
            _warn(
                "does not sum to zero over dimension 1, as that of cross-entropy does", likelihood
            )
        elif likelihood == "bernoulli" and values.shape[1] > 1 and left < ZERO * size:
            _warn("sums to zero over dimension 1, as that of cross-entropy does", likelihood)


def _warn(finding: str, likelihood: str) -> None:
    warnings.warn(
        f"the gradient of the loss with respect to the model's output {finding}, but labels are "
        f"sampled for likelihood='{likelihood}': the Fisher matrix is not that of this loss. "
        "'categorical' belongs to cross_entropy, 'bernoulli' to "
        "binary_cross_entropy_with_logits, 'gaussian' to half the squared error; 'empirical' "
        "takes the data's labels, whatever the loss",
        stacklevel=3,
    )
