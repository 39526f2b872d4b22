"""Layer inputs and pre-activation gradients, gathered while the user's own loop runs.

Statistics follow .grad: what a training forward stored counts only once backward reaches the
layer, several micro-batches add up, and zero_grad clears them. A forward hook and a tensor hook
on the layer's output do the work; full backward hooks would forbid an in-place ReLU after it.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from optim.layers import Block
from optim.linalg import factor_dtype

UNSEEN = (
    "has a gradient but its forward was not seen while training; call the module itself (not "
    "F.linear with its weight) between zero_grad() and step(), or inside the closure if there is "
    "one, or freeze its weight before the optimizer is built"
)
NOT_WARM = "saw no batch during warm_up; each closure must run the whole model"


@dataclass(eq=False)
class Call:
    """One pass of a batch through a block: inputs x [m, in], sampled gradients g [m, out]."""

    block: Block
    x: Tensor
    g: Tensor | None = None
    counted: bool = False  # a second backward through the same graph finds it True


@dataclass(eq=False)
class Totals:
    """What backward has delivered for a block since zero_grad: named means over `count` rows."""

    count: int = 0
    backward: int = -1  # id of the backward that added last
    means: dict[str, Tensor] = field(default_factory=dict)


Accumulate = Callable[[Totals, Call, Tensor], None]


class _Hook:
    """Calls a living Capture; a copied or pickled model carries an inert one instead."""

    def __init__(self, capture: "Capture", method: str) -> None:
        self.capture = weakref.ref(capture)
        self.method = method

    def __call__(self, *args: Any) -> None:
        capture = self.capture()
        if capture is not None:
            getattr(capture, self.method)(*args)

    def __reduce__(self) -> tuple[Callable[[], Any], tuple[()]]:
        return _inert_hook, ()


def _inert_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    return None


class Capture:
    """Totals of every block, by name.

    accumulate(totals, call, delivered): adds one backward; delivered [m, out] is the gradient of
        the loss as the user scaled it (g_n / m under a mean). None switches capturing off.
    sample(output) -> score: if set, the score is back-propagated from the model's output to the
        pre-activations and arrives as call.g.
    eager: count a call when the forward is done, without waiting for backward (warm_up).
    """

    def __init__(self, model: nn.Module, blocks: list[Block]) -> None:
        self.totals: dict[str, Totals] = {}
        self.accumulate: Accumulate | None = None
        self.sample: Callable[[Tensor], Tensor] | None = None
        self.eager = False
        self._blocks = {block.module: block for block in blocks}
        self._paused = False
        # calls of the forward under way; the edges stay out of Call, which the graph holds:
        # graph -> hook -> call -> edge -> graph would never be freed
        self._open: list[tuple[Call, GradientEdge | None]] | None = None
        for block in blocks:
            block.module.register_forward_hook(_Hook(self, "_layer_done"), with_kwargs=True)
        model.register_forward_pre_hook(_Hook(self, "_model_starts"))
        model.register_forward_hook(_Hook(self, "_model_done"))

    def clear(self) -> None:
        """Forget all totals, as zero_grad does with gradients."""
        self.totals = {}

    @contextmanager
    def recording(self, accumulate: Accumulate | None, *, eager: bool = False) -> Iterator[None]:
        """Inside, accumulate by this function, from empty totals."""
        before = self.accumulate, self.eager
        self.accumulate, self.eager = accumulate, eager
        self.clear()
        try:
            yield
        finally:
            self.accumulate, self.eager = before

    def collect(self, blocks: list[Block], missing: str = UNSEEN) -> dict[Block, Totals]:
        """The totals of these blocks.

        Raises: ValueError naming a block without statistics (and saying what is `missing`), or
        the blocks, if they saw different numbers of rows.
        """
        for block in blocks:
            if block.name not in self.totals:
                raise ValueError(f"layer '{block.name}' {missing}")
        found = {block: self.totals[block.name] for block in blocks}
        counts = {block.name: total.count for block, total in found.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"layers saw different numbers of rows: {counts}; supported is one row per "
                "example in every layer (weight sharing is not yet supported)"
            )
        return found

    def _model_starts(self, *_: Any) -> None:
        self._open = []

    def _layer_done(
        self, module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor
    ) -> None:
        eager_now = self.eager and self.sample is None
        training = torch.is_grad_enabled() and z.requires_grad
        if self.accumulate is None or self._paused or not (training or eager_now):
            return
        block = self._blocks.get(module)
        if block is None:
            return
        x = args[0] if args else kwargs["input"]
        self._refuse(block, x)
        call = Call(block, x.detach().to(factor_dtype(block.weight)))
        if self._open is not None:
            wants_edge = self.sample is not None
            self._open.append((call, get_gradient_edge(z) if wants_edge else None))
        if eager_now:
            self._commit(call, z.detach())
        elif not self.eager:
            z.register_hook(lambda gradient: self._commit(call, gradient))

    def _refuse(self, block: Block, x: Tensor) -> None:
        """Raise ValueError for what is not one row per example."""
        if x.ndim != 2:
            raise ValueError(
                f"layer '{block.name}' got an input of shape {tuple(x.shape)}; supported is "
                "[batch, in], one row per example (weight sharing is not yet supported)"
            )
        if any(call.block is block for call, _ in self._open or ()):
            raise ValueError(
                f"layer '{block.name}' was called twice in one forward; supported is one call, "
                "one row per example (weight sharing is not yet supported)"
            )

    def _model_done(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        opened, self._open = self._open or [], None
        if not opened or self.sample is None or self.accumulate is None:
            return
        if not isinstance(output, Tensor):
            raise ValueError(
                "labels are sampled from the model's output, which must be one tensor; "
                f"{type(module).__name__} returned {type(output).__name__}; return a tensor or "
                "use likelihood='empirical'"
            )
        if output.requires_grad:
            self._back_propagate(opened, output)

    def _back_propagate(
        self, opened: list[tuple[Call, GradientEdge | None]], output: Tensor
    ) -> None:
        """call.g [m, out] = the sampled score, taken back to each pre-activation."""
        assert self.sample is not None
        for call, _ in opened:
            if len(call.x) != len(output):
                raise ValueError(
                    f"layer '{call.block.name}' saw {len(call.x)} rows, the model's output has "
                    f"{len(output)}; supported is one row per example"
                )
        edges = [edge for _, edge in opened if edge is not None]
        score = self.sample(output.detach()).to(output.dtype)
        self._paused = True
        try:
            gradients = torch.autograd.grad(
                output, edges, score, retain_graph=True, allow_unused=True
            )
        finally:
            self._paused = False
        for (call, _), g in zip(opened, gradients, strict=True):
            call.g = None if g is None else g.detach().to(call.x.dtype)
            if self.eager and g is not None:
                self._commit(call, g)

    @torch.no_grad()
    def _commit(self, call: Call, delivered: Tensor) -> None:
        if self._paused or self.accumulate is None:
            return
        if self.sample is not None and call.g is None and not call.counted:
            raise ValueError(
                f"layer '{call.block.name}' has no sampled gradient: it must be reached through "
                "a call of the model itself, and the model's output must depend on it"
            )
        total = self._total(call.block)
        self.accumulate(total, call, delivered.detach().to(call.x.dtype))
        if not call.counted:
            total.count += len(call.x)
        # the graph may outlive the step (a kept loss), the batch should not
        call.counted, call.x, call.g = True, call.x.new_empty(0), None

    def _total(self, block: Block) -> Totals:
        """The block's totals, new if its gradient was cleared behind our back.

        model.zero_grad() does not pass here; but a weight without .grad in a backward other
        than the one that added last tells that it was called.
        """
        backward = torch._C._current_graph_task_id()
        total = self.totals.get(block.name)
        if total is None or (block.weight.grad is None and total.backward != backward):
            total = self.totals[block.name] = Totals()
        total.backward = backward
        return total
