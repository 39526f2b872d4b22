"""Capture of layer inputs and pre-activation gradients: what backward adds to .grad counts.

Full backward hooks would forbid an in-place ReLU after the layer, hence hooks on its tensors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..blocks.blocks import Block
from ..linalg.basics import factor_dtype
from . import positions
from .closures import full_precision
from .hooks import GradWatch, WeakHook

UNSEEN = (
    "has a gradient but its forward was not seen while training; call the module itself (not "
    "F.linear with its weight) between zero_grad() and step(), or inside the closure if there is "
    "one, or freeze its weight before the optimizer is built; if it is not used in every step, "
    "clear gradients to None, as zero_grad() does by default"
)
NOT_WARM = (
    "saw no batch during warm_up; each closure must run the whole model, not under no_grad() where "
    "labels are sampled, and backward where they are the data's"
)
SPENT = (
    "was back-propagated twice through the same forward pass; its statistics were cleared after "
    "the first. Run the forward again for the loss that is trained"
)
OVERWRITTEN = (
    "the input of layer '{}' was changed in place between its forward and backward pass, so that "
    "its statistics would be wrong; change a copy"
)


@dataclass(eq=False)
class Call:
    """One pass of a batch through a block: its input x and sampled gradient g, as they came.

    forward: number of the model's forward it belongs to. z: mean output. ours: x is a copy, or of
    the model's own making. version: x's, where it is not a copy.
    """

    block: Block
    x: Tensor
    rows: int
    forward: int
    z: Tensor | None = None
    g: Tensor | None = None
    ours: bool = True
    version: int | None = None
    counted: bool = False  # a second backward through the same graph finds it True

    def kept(self) -> Tensor:
        """The input for use until the step: the memory of a batch may be filled anew before."""
        return self.x if self.ours else self.x.clone()

    def inputs(self) -> Tensor:
        """What the weights were multiplied with, [groups, m, T, in], without the 1."""
        return positions.inputs(self.block, self.x)

    def gradients(self, g: Tensor) -> Tensor:
        """Gradients w.r.t. the output, delivered or sampled, as [groups, m, T, out]."""
        return positions.gradients(self.block, g.to(self.x.dtype))


@dataclass(eq=False)
class Totals:
    """What backward has delivered for a block since zero_grad: named means over `rows`.

    A row is one example at one position; there are rows / examples positions: of several calls in
    one forward of the model the first that counts brings examples, the others positions. kept:
    whatever of the batch is needed whole until the step. share: this process's part of the
    examples.
    """

    examples: int = 0
    rows: int = 0
    share: float = 1.0
    backward: int = -1  # id of the backward that added last
    forwards: set[int] = field(default_factory=set)  # whose examples are counted
    means: dict[str, Tensor] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)

    @property
    def positions(self) -> float:
        """T, positions per example."""
        return self.rows / self.examples


Accumulate = Callable[[Totals, Call, Tensor], None]


class _Delivered(NamedTuple):
    """What backward brought to a call, until it gets to the weight; whether .grad was cleared."""

    backward: int
    call: Call
    gradient: Tensor
    cleared: bool


def one_tensor(module: nn.Module, output: Any) -> None:
    """Raise ValueError unless the model's output is one that labels can be sampled from."""
    if not isinstance(output, Tensor):
        raise ValueError(
            "labels are sampled from the model's output, which must be one tensor; "
            f"{type(module).__name__} returned {type(output).__name__}; return a tensor or "
            "use likelihood='empirical'"
        )
    if output.ndim == 0:
        raise ValueError(
            f"{type(module).__name__} returned a single number; labels are sampled for each "
            "example of an output whose dimension 0 is the batch"
        )


class Capture:
    """Totals of every block, by name.

    accumulate(totals, call, delivered): adds one backward; delivered, of the output's shape, is
        the gradient of the loss as the user scaled it (g_n / m under a mean). None: no capturing.
    sample(output) -> score: if set, it is back-propagated to the pre-activations, call.g.
    eager: count a call when the forward is done, without waiting for backward (warm_up).
    outputs_only: parameters need no gradient now (second pass); only pre-activations get one.
    wants_outputs: call.z is wanted.
    """

    sampling = False  # of whichever optimizer: its backward delivers to nobody's statistics

    def __init__(self, model: nn.Module, blocks: list[Block]) -> None:
        self.totals: dict[str, Totals] = {}
        self.accumulate: Accumulate | None = None
        self.sample: Callable[[Tensor], Tensor] | None = None
        self.eager = False
        self.outputs_only = False
        self.wants_outputs = False
        self._blocks: dict[nn.Module, Block] = {}
        self._names: dict[Tensor, str] = {}
        self._grads = GradWatch(self._added)
        self._delivered: dict[str, list[_Delivered]] = {}
        self._forward = 0
        # calls of the forward under way; the edges stay out of Call, which the graph holds:
        # graph -> hook -> call -> edge -> graph would never be freed
        self._open: list[tuple[Call, GradientEdge | None]] | None = None
        self.watch(blocks)
        model.register_forward_pre_hook(WeakHook(self, "_model_starts"))
        model.register_forward_hook(WeakHook(self, "_model_done"))

    def watch(self, blocks: list[Block]) -> None:
        """Capture at these blocks too."""
        for block in blocks:
            self._blocks[block.module] = block
            block.module.register_forward_hook(WeakHook(self, "_layer_done"), with_kwargs=True)
            self._names[block.weight] = block.name
            self._grads.watch(block.weight)

    def clear(self) -> None:
        """Forget all totals, as zero_grad does with gradients."""
        self.totals, self._delivered = {}, {}

    @contextmanager
    def recording(
        self, accumulate: Accumulate | None, *, eager: bool = False, outputs_only: bool = False
    ) -> Iterator[None]:
        """Inside, accumulate by this function, from empty totals."""
        before = self.accumulate, self.eager, self.outputs_only
        self.accumulate, self.eager, self.outputs_only = accumulate, eager, outputs_only
        self.clear()
        try:
            yield
        finally:
            self.accumulate, self.eager, self.outputs_only = before

    def collect(self, blocks: list[Block], missing: str = UNSEEN) -> dict[Block, Totals]:
        """The totals of these blocks. Raises: ValueError for none, or unequal example counts."""
        for block in blocks:
            if block.name not in self.totals:
                raise ValueError(f"layer '{block.name}' {missing}")
            if self.totals[block.name].rows == 0:
                raise ValueError(f"layer '{block.name}' {SPENT}")
        found = {block: self.totals[block.name] for block in blocks}
        counts = {block.name: total.examples for block, total in found.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(
                f"layers saw different numbers of examples: {counts}; dimension 0 of every "
                "layer's input must be the batch, positions come after it: [batch, ..., in]"
            )
        return found

    def _model_starts(self, *_: Any) -> None:
        self._open = []
        self._forward += 1

    def _layer_done(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], z: Tensor
    ) -> Tensor | None:
        eager_now = self.eager and self.sample is None
        block = self._blocks.get(module)
        if block is None or self.accumulate is None or Capture.sampling:
            return None
        if not (eager_now or torch.is_grad_enabled()):
            return None
        replaced = None
        if self.outputs_only and not z.requires_grad:
            # a clone, since an in-place activation may follow and refuses a leaf
            z = replaced = z.requires_grad_().clone()
        if not (eager_now or z.requires_grad):
            return None
        call = self._call(block, args[0] if args else kwargs["input"], z)
        if self._open is not None:
            wants_edge = self.sample is not None
            self._open.append((call, get_gradient_edge(z) if wants_edge else None))
        if eager_now:
            self._commit(call, z.detach())
        elif not self.eager:
            z.register_hook(lambda gradient: self._arrived(call, gradient))
        return replaced

    def _call(self, block: Block, x: Tensor, z: Tensor) -> Call:
        """The record of this call. Raises: ValueError for an input without a batch dimension."""
        dims = 4 if isinstance(block.module, nn.Conv2d) else 2
        if x.ndim < dims:
            raise ValueError(
                f"layer '{block.name}' got an input of shape {tuple(x.shape)}; dimension 0 must "
                f"be the batch: {'[batch, channels, h, w]' if dims == 4 else '[batch, ..., in]'}"
            )
        if self._open is None:
            self._forward += 1  # a call outside the model's forward is one of its own
        if len(x) == 0:
            raise ValueError(f"layer '{block.name}' got an empty batch, {list(x.shape)}")
        mean = None
        if self.wants_outputs:
            with torch.no_grad(), full_precision(z.device):
                mean = z.detach().to(factor_dtype(block.weight))
                mean = mean.mean((0, 2, 3)) if dims == 4 else mean.flatten(0, -2).mean(0)
        rows = z.numel() // block.weight.shape[0]
        # under autocast as the layer multiplies it, which is a copy: x itself may be added to
        dtype = factor_dtype(block.weight)
        own, copied = x.detach().to(z.dtype).to(dtype), {x.dtype, z.dtype} != {dtype}
        version = None if copied or x.is_inference() else x._version
        ours = copied or x.grad_fn is not None
        return Call(block, own, rows, self._forward, mean, ours=ours, version=version)

    def _model_done(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        opened, self._open = self._open or [], None
        if not opened or self.sample is None or self.accumulate is None:
            return
        one_tensor(module, output)
        if output.requires_grad:
            self._back_propagate(opened, output)

    def _back_propagate(
        self, opened: list[tuple[Call, GradientEdge | None]], output: Tensor
    ) -> None:
        """call.g = the sampled score, taken back to each pre-activation."""
        assert self.sample is not None
        for call, _ in opened:
            if len(call.x) != len(output):
                raise ValueError(
                    f"layer '{call.block.name}' saw {len(call.x)} examples, the model's output "
                    f"has {len(output)}; dimension 0 must be the batch in both"
                )
        edges = [edge for _, edge in opened if edge is not None]
        gradients = score_gradients(output, self.sample, edges, allow_unused=True)
        for (call, _), g in zip(opened, gradients, strict=True):
            call.g = None if g is None else g.detach().to(call.x.dtype)
            if self.eager and g is not None:
                self._commit(call, g)

    def _arrived(self, call: Call, gradient: Tensor) -> None:
        """Backward is at a call; it counts as soon as it gets to the weight, if it does."""
        if Capture.sampling or self.accumulate is None:
            return
        if self.outputs_only:  # it will not
            self._commit(call, gradient)
            return
        if call.version is not None and call.version != call.x._version and not call.counted:
            raise ValueError(OVERWRITTEN.format(call.block.name))
        backward, block = torch._C._current_graph_task_id(), call.block
        own = self._delivered.setdefault(block.name, [])
        own[:] = [one for one in own if one.backward == backward]
        total = self.totals.get(block.name)
        earlier = total is not None and total.backward != backward
        cleared = earlier and self._grads.is_cleared(block.weight)
        own.append(_Delivered(backward, call, gradient, cleared))

    def _added(self, weight: Tensor, backward: int) -> None:
        """Backward has added to a weight's .grad."""
        name = self._names[weight]
        arrived = [one for one in self._delivered.pop(name, []) if one.backward == backward]
        if arrived and arrived[0].cleared:
            self.totals.pop(name, None)
        for one in arrived:
            self._commit(one.call, one.gradient)

    @torch.no_grad()
    def _commit(self, call: Call, delivered: Tensor) -> None:
        if self.accumulate is None:
            return
        if self.sample is not None and call.g is None and not call.counted:
            raise ValueError(
                f"layer '{call.block.name}' has no sampled gradient: it must be reached through "
                "a call of the model itself, and the model's output must depend on it"
            )
        total = self.totals.setdefault(call.block.name, Totals())
        total.backward = torch._C._current_graph_task_id()
        with full_precision(delivered.device):
            self.accumulate(total, call, delivered.detach().to(call.x.dtype))
        if not call.counted:
            total.examples += 0 if call.forward in total.forwards else len(call.x)
            total.forwards.add(call.forward)
            total.rows += call.rows
        # the graph may outlive the step (a kept loss), the batch should not
        call.counted, call.x, call.g, call.version = True, call.x.new_empty(0), None, None


def score_gradients(
    output: Tensor, sample: Callable[[Tensor], Tensor], wanted: Any, **options: bool
) -> tuple[Tensor, ...]:
    """Gradients of a sampled score with respect to what is wanted; the graph stays."""
    with full_precision(output.device):
        score = sample(output.detach()).to(output.dtype)
    Capture.sampling = True
    try:
        return torch.autograd.grad(output, wanted, score, retain_graph=True, **options)
    finally:
        Capture.sampling = False


def once(call: Call) -> None:
    """Raise ValueError at a second backward through the same forward."""
    if call.counted:
        raise ValueError(
            f"layer '{call.block.name}': two backwards through one forward; gradients of the "
            "data's labels are needed whole for each example, so add the losses first"
        )
