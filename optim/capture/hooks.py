"""Hooks with weak references, and a hook on the accumulation of .grad."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class WeakHook:
    """Calls a method of a living object; a copied or pickled model carries an inert one instead."""

    def __init__(self, capture: Any, method: str) -> None:
        self.capture = weakref.ref(capture)
        self.method = method

    def __call__(self, *args: Any) -> Any:
        """What the method returns; None once the object is gone."""
        capture = self.capture()
        return None if capture is None else getattr(capture, self.method)(*args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


def _inert_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    return None


class GradWatch:
    """Tells when backward adds to the .grad of weights, and whether that was cleared since.

    added(weight, backward): called then, backward being the id of the graph task. What
    torch.autograd.grad looks at adds to no .grad.
    """

    def __init__(self, added: Callable[[Tensor, int], None]) -> None:
        self.added = added
        self._seen: dict[Tensor, tuple[int, int]] = {}  # which tensor .grad was, in which version

    def watch(self, weight: Tensor) -> None:
        """Watch this weight too."""
        weight.register_post_accumulate_grad_hook(WeakHook(self, "_added"))

    def is_cleared(self, weight: Tensor) -> bool:
        """Whether there is no .grad, or one of zeros that somebody wrote since it was added to.

        model.zero_grad() does not pass by an optimizer, but leaves this.
        """
        grad = weight.grad
        if grad is None:
            return True
        # looked at only where someone wrote into it: micro-batches do not wait for this
        return self._seen.get(weight) != (id(grad), grad._version) and not bool(grad.any())

    def _added(self, weight: Tensor) -> None:
        self.added(weight, torch._C._current_graph_task_id())
        if weight.grad is not None:
            self._seen[weight] = id(weight.grad), weight.grad._version
