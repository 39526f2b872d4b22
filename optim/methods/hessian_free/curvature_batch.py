"""The curvature batch: a random part of the examples that a closure gave to the model."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .jacobians import Piece, copied, map_leaves

NO_CALL = (
    "no gradient passed through a call of the model: the closure must call the model "
    "itself, not its parts, and then backward"
)
NO_BATCH = (
    "the model must return one tensor whose dimension 0 is the batch; {} returned a {} without"
)
TOO_FEW = (
    "curvature_batch is {wanted}, but the batch has only {batch} examples; "
    "lower curvature_batch, or leave an incomplete last batch out (drop_last=True)"
)


class ModelCalls:
    """The model's calls in one closure, with the loss gradient at each output."""

    def __init__(self) -> None:
        self._calls: list[Piece] = []
        self._given: list[tuple[Any, Any]] = []

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Copy the arguments (a forward pre-hook): the model may write into them."""
        self._given.append((copied(args), copied(kwargs)) if torch.is_grad_enabled() else ((), {}))

    def after(self, model: nn.Module, _: tuple[Any, ...], __: dict[str, Any], output: Any) -> None:
        """Record the call (a forward hook). Raises: ValueError for an output without a batch."""
        args, kwargs = self._given.pop()
        if not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise ValueError(NO_BATCH.format(type(model).__name__, type(output).__name__))
        if output.requires_grad:
            number = len(self._calls)
            self._calls.append(Piece(model, len(output), args, kwargs))
            # the graph may outlive the step (a kept loss); it must not hold the batch
            output.register_hook(lambda gradient: self._reached(number, gradient))

    def _reached(self, number: int, gradient: Tensor) -> None:
        if number < len(self._calls):
            call = self._calls[number]  # backward may come back several times
            call.gradient = gradient if call.gradient is None else call.gradient + gradient

    def clear(self) -> None:
        """Drop all calls."""
        self._calls = []

    @property
    def _used(self) -> list[Piece]:
        return [call for call in self._calls if call.gradient is not None]

    @property
    def examples(self) -> int:
        """Number of examples. Raises: ValueError if no call got a gradient."""
        if not self._used:
            raise ValueError(NO_CALL)
        return sum(call.examples for call in self._used)

    def pieces(self, rows: Tensor | None) -> list[Piece]:
        """The calls restricted to these examples, in ascending order; None takes all."""
        if rows is None:
            return self._used
        made, before = [], 0
        for call in self._used:
            own = rows[(rows >= before) & (rows < before + call.examples)] - before
            if len(own):
                made.append(_rows_of(call, own))
            before += call.examples
        return made


@contextmanager
def recorded(model: nn.Module) -> Iterator[ModelCalls]:
    """Record the calls of the model inside the context."""
    calls = ModelCalls()
    handles = (
        model.register_forward_pre_hook(calls.before, with_kwargs=True),
        model.register_forward_hook(calls.after, with_kwargs=True),
    )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def subset(batch: int, wanted: int | None, generator: torch.Generator) -> Tensor | None:
    """Rows of the curvature batch in ascending order, drawn without repetition; None for all.

    On the CPU, since the host must know how many rows fall to which call. wanted: how many; None
    is a quarter of the batch, rounded up. Raises: ValueError if the batch has fewer examples.
    """
    count = -(-batch // 4) if wanted is None else wanted
    if count > batch:
        raise ValueError(TOO_FEW.format(batch=batch, wanted=count))
    if count == batch:
        return None
    order = torch.randperm(batch, generator=generator, device=generator.device)
    return order[:count].sort().values


def _rows_of(call: Piece, rows: Tensor) -> Piece:
    """The call with these rows of every tensor argument that has one row per example."""

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == call.examples:
            return leaf[rows.to(leaf.device, non_blocking=True)]
        return leaf

    args, kwargs, gradient = map_leaves(take, (call.args, call.kwargs, call.gradient))
    return Piece(call.model, len(rows), args, kwargs, gradient)
