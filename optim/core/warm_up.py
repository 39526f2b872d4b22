"""Initialisation of running statistics by a pass over the data before the first step."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..blocks.blocks import Block
from ..capture.capture import NOT_WARM, Accumulate, Totals
from ..capture.closures import run, untouched
from ..linalg.basics import all_finite
from .errors import NumericalError
from .harness import Harness
from .stacks import Stack

WARM_NOT_FINITE = (
    "batch {} of warm_up gives '{}' {} with NaN or infinity; look at the inputs of that batch, or "
    "leave it out"
)


def warming(
    harness: Harness,
    closures: Iterable[Callable[[], Any]],
    accumulate: Accumulate | None,
    *,
    eager: bool,
) -> Iterator[tuple[int, dict[Stack, dict[Block, Totals]]]]:
    """Run each closure at the untouched model; (1, 2, ...) with what capturing gathered.

    accumulate: None captures nothing; .grad is there to be read.

    Raises: RuntimeError after the first step; ValueError if there is no closure or a layer
    saw no batch; NumericalError naming a layer whose statistics are not finite.
    """
    if harness.step or harness.optimizer.state:
        raise RuntimeError("warm_up comes once, before the first step")
    everything = {stack: stack.blocks for stack in harness.stacks}
    batches = 0
    with untouched(harness.model):
        for closure in closures:
            batches += 1
            try:
                with harness.capture.recording(accumulate, eager=eager):
                    run(closure)
                    found = {} if accumulate is None else harness.collected(everything, NOT_WARM)
                _refuse_not_finite(harness, batches, found)
            except Exception:  # it may come again
                harness.optimizer.state.clear()
                harness.regroup()
                raise
            yield batches, found
    harness.capture.clear()
    if not batches:
        raise ValueError("warm_up saw no batch: its argument is an iterable of callables")


def _refuse_not_finite(
    harness: Harness, batch: int, found: dict[Stack, dict[Block, Totals]]
) -> None:
    """Raise NumericalError if one batch of warm_up would spoil the mean over all."""
    for block, total in ((b, t) for totals in found.values() for b, t in totals.items()):
        kept = [
            part for rows in total.kept for part in (rows if isinstance(rows, tuple) else [rows])
        ]
        parts = [part for part in [*total.means.values(), *kept] if isinstance(part, Tensor)]
        if not all(bool(all_finite(part)) for part in parts):
            raise NumericalError(WARM_NOT_FINITE.format(batch, block.name, "statistics"))
    for block in [] if found else harness.blocks:
        gradients = [p.grad for p in block.parameters if p.grad is not None]
        if not all(bool(all_finite(g)) for g in gradients):
            raise NumericalError(WARM_NOT_FINITE.format(batch, block.name, "a gradient"))


NO_GRADIENT = "got no gradient in warm_up; each closure must run the whole model, and backward"


def warm_gradients(
    harness: Harness, closures: Iterable[Callable[[], Any]], *, decay: bool
) -> Iterator[tuple[int, dict[Stack, Tensor]]]:
    """For each closure (1, 2, ...) the gradients it leaves, with coupled weight decay or without.

    Raises: RuntimeError after the first step; ValueError for a parameter without a gradient.
    """
    fresh = (partial(_afresh, harness.model, closure) for closure in closures)
    for batch, _ in warming(harness, fresh, None, eager=False):
        live = harness.live()
        for stack in harness.stacks:
            for block in stack.blocks:
                if block not in live.get(stack, []):
                    raise ValueError(f"parameter '{block.name}' {NO_GRADIENT}")
        yield batch, {s: harness.gradient(s, s.blocks, decay=decay) for s in live}


def _afresh(model: nn.Module, closure: Callable[[], Any]) -> Any:
    model.zero_grad()
    return run(closure)
