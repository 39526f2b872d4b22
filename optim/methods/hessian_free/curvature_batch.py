"""The curvature minibatch: some of the examples that a closure has shown to the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .jacobians import Piece, copied

NO_CALL = (
    "the closure did not take the gradient through a call of the model; it must call the model "
    "itself, not its parts, and then backward"
)
NO_BATCH = (
    "the model must return one tensor whose dimension 0 is the batch; {} returned a {} without"
)
TOO_FEW = (
    "the batch has {batch} examples, the curvature batch {wanted}, which must be part of it; "
    "lower curvature_batch, or leave an incomplete last batch out (drop_last=True)"
)


@dataclass(eq=False)
class Call:
    """What a model was called with on so many examples, and the gradient its output was given."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    examples: int
    gradient: Tensor | None = None


class Calls:
    """What went into a model while gradients were recorded; those that backward came back to."""

    def __init__(self) -> None:
        self._calls: list[Call] = []
        self._given: list[tuple[Any, Any]] = []

    def given(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the model, which may write into what it is given."""
        self._given.append((copied(args), copied(kwargs)) if torch.is_grad_enabled() else ((), {}))

    def __call__(
        self, module: nn.Module, _: tuple[Any, ...], __: dict[str, Any], output: Any
    ) -> None:
        """A forward hook of the model."""
        args, kwargs = self._given.pop()
        if not torch.is_grad_enabled():
            return
        if not isinstance(output, Tensor) or output.ndim == 0:
            raise ValueError(NO_BATCH.format(type(module).__name__, type(output).__name__))
        if output.requires_grad:
            number = len(self._calls)
            self._calls.append(Call(args, kwargs, len(output)))
            # the graph may outlive the step (a kept loss); it must not hold the batch
            output.register_hook(lambda gradient: self._reached(number, gradient))

    def _reached(self, number: int, gradient: Tensor) -> None:
        if number < len(self._calls):
            call = self._calls[number]  # backward may come back several times
            call.gradient = gradient if call.gradient is None else call.gradient + gradient

    def clear(self) -> None:
        """Forget all."""
        self._calls = []

    @property
    def _used(self) -> list[Call]:
        return [call for call in self._calls if call.gradient is not None]

    @property
    def examples(self) -> int:
        """How many there were. Raises: ValueError if the model was not called."""
        if not self._used:
            raise ValueError(NO_CALL)
        return sum(call.examples for call in self._used)

    def pieces(self, model: nn.Module, rows: Tensor | None) -> list[Piece]:
        """The calls again, with these examples only; rows in ascending order, None takes all."""
        made, before = [], 0
        for call in self._used:
            if rows is None:
                made.append(Piece(model, call.examples, call.args, call.kwargs, call.gradient))
                continue
            own = rows[(rows >= before) & (rows < before + call.examples)] - before
            if len(own):
                take = _taker(own, call.examples)
                cut = take(call.args), take(call.kwargs), take(call.gradient)
                made.append(Piece(model, len(own), *cut))
            before += call.examples
        return made


@contextmanager
def recorded(model: nn.Module) -> Iterator[Calls]:
    """Inside, calls of the model are recorded."""
    calls = Calls()
    handles = (
        model.register_forward_pre_hook(calls.given, with_kwargs=True),
        model.register_forward_hook(calls, with_kwargs=True),
    )
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def subset(batch: int, wanted: int | None, generator: torch.Generator) -> Tensor | None:
    """Rows of the curvature batch in ascending order, drawn without repetition; None for all.

    On the host, like the generator: how many fall to which call has to be known there.
    wanted: how many; None is a quarter of the batch, rounded up.

    Raises: ValueError if there are not so many.
    """
    count = -(-batch // 4) if wanted is None else wanted
    if count > batch:
        raise ValueError(TOO_FEW.format(batch=batch, wanted=count))
    if count == batch:
        return None
    order = torch.randperm(batch, generator=generator, device=generator.device)
    return order[:count].sort().values


def _taker(rows: Tensor, count: int) -> Callable[[Any], Any]:
    """Takes the rows of every tensor that has one for each example, at any depth."""

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (
                value[rows.to(value.device, non_blocking=True)]
                if value.ndim and len(value) == count
                else value
            )
        if isinstance(value, dict):
            return {name: take(one) for name, one in value.items()}
        if type(value) in (list, tuple):
            return type(value)(take(one) for one in value)
        return value

    return take
