"""Capture of the gradients of sampled labels w.r.t. every parameter; they follow .grad."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.blocks import Variable
from ..linalg.basics import factor_dtype, running_mean
from .capture import Accumulate, Capture, Totals, one_tensor, score_gradients
from .hooks import GradWatch, WeakHook

UNSEEN = (
    "has a gradient but no label was sampled for it; call the model itself, not its parts, between "
    "zero_grad() and step(), or freeze the parameter before the optimizer is built"
)


@dataclass(eq=False)
class _Draw:
    """Gradients of one forward's sampled labels, summed over examples; {} once counted."""

    gradients: dict[Variable, Tensor]
    examples: int


def add_gradient(totals: Totals, gradient: Any, examples: Any) -> None:
    """means["gradient"]: mean over examples, of the parameter's shape."""
    seen = totals.examples
    totals.means["gradient"] = running_mean(
        totals.means.get("gradient"), gradient / examples, examples, seen
    )


class SampledGradients:
    """Totals of every variable, by name; stands where a Capture does.

    accumulate: None while nothing is to be gathered. sample(output) -> score of sampled labels,
    one per example; None samples nothing. eager: count when the forward is done (warm_up).
    """

    def __init__(self, model: nn.Module, variables: list[Variable]) -> None:
        self.totals: dict[str, Totals] = {}
        self.accumulate: Callable[[Totals, Any, Any], None] | None = None
        self.sample: Callable[[Tensor], Tensor] | None = None
        self.eager = False
        self._variables: list[Variable] = []
        self._backward = -1  # id of the backward that counted last
        self._grads = GradWatch(self._added)
        self._waiting: list[tuple[int, _Draw, bool]] = []
        self.watch(variables)
        model.register_forward_hook(WeakHook(self, "_model_done"))

    def watch(self, variables: list[Variable]) -> None:
        """Gather for these variables too."""
        self._variables += variables
        for variable in variables:
            self._grads.watch(variable.weight)

    def clear(self) -> None:
        """Forget all totals, as zero_grad does with gradients."""
        self.totals, self._waiting = {}, []

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

    def collect(self, variables: list[Variable], missing: str = UNSEEN) -> dict[Variable, Totals]:
        """The totals of these variables. Raises: ValueError naming one without."""
        for variable in variables:
            if variable.name not in self.totals:
                raise ValueError(f"parameter '{variable.name}' {missing}")
        return {variable: self.totals[variable.name] for variable in variables}

    def _model_done(self, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        resting = self.sample is None or self.accumulate is None or Capture.sampling
        if resting or not torch.is_grad_enabled():
            return
        one_tensor(module, output)
        if not output.requires_grad:
            return
        draw = self._draw(output)
        if self.eager:
            self._commit(draw)
        else:
            output.register_hook(lambda _: self._arrived(draw))

    def _draw(self, output: Tensor) -> _Draw:
        assert self.sample is not None
        live = [v for v in self._variables if v.weight.requires_grad]
        if not live:
            return _Draw({}, len(output))
        weights = [v.weight for v in live]
        gradients = score_gradients(output, self.sample, weights, materialize_grads=True)
        for v, g in zip(live, gradients, strict=True):
            if g.is_sparse:
                raise ValueError(
                    f"parameter '{v.name}': sparse gradients are not supported; use sparse=False"
                )
        return _Draw(dict(zip(live, gradients, strict=True)), len(output))

    def _arrived(self, draw: _Draw) -> None:
        """Backward is at the model's output; it counts as soon as it gets to a parameter."""
        if Capture.sampling or self.accumulate is None or not draw.gradients:
            return
        backward = torch._C._current_graph_task_id()
        self._waiting = [one for one in self._waiting if one[0] == backward]
        cleared = backward != self._backward and all(
            self._grads.is_cleared(v.weight) for v in self._variables
        )
        self._waiting.append((backward, draw, cleared))

    def _added(self, _: Tensor, backward: int) -> None:
        """Backward has added to a parameter's .grad."""
        waiting, self._waiting = self._waiting, []
        for number, draw, cleared in waiting:
            if number == backward:
                if cleared and self._backward != backward:
                    self.totals = {}
                self._backward = backward
                self._commit(draw)

    @torch.no_grad()
    def _commit(self, draw: _Draw) -> None:
        if self.accumulate is None:
            return
        for variable, gradient in draw.gradients.items():
            total = self.totals.setdefault(variable.name, Totals())
            self.accumulate(total, gradient.to(factor_dtype(gradient)), draw.examples)
            total.examples += draw.examples
            total.rows += draw.examples
        # the graph may outlive the step (a kept loss), the gradients should not
        draw.gradients = {}
