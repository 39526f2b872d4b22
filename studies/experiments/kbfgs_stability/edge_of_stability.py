"""Sharpness of a training at one step: distance to the edge of stability.

Sharpness is the greatest eigenvalue of lr P C, with P the preconditioner and C the exact Hessian
or GGN of some training examples, found by products alone.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kronscope.diag import Block, Operator, Problem, exact, live, metrics
from kronscope.diag.operators import SingleStep, like
from kronscope.diag.spectra import NotFiniteError, NotPositiveDefiniteError, sharpest, side_by_side

from ... import training
from ...results.records import loss_row

TRUTHS = ("hessian", "ggn")
ENOUGH = 0.05  # relative residual; the value's own error is far below it
PRODUCTS = 24

Record = dict[str, Any]


@dataclass(frozen=True)
class Observed:
    """Model, preconditioner and curvature of a training at one step, as copies.

    layers: those with a preconditioner. P: by layer. C: by truth, of all these layers together.
    states: by layer, the optimizer's state of its weight; read only.
    """

    problem: Problem
    layers: list[Block]
    whole: Block
    P: dict[str, Operator]
    C: dict[str, Operator]
    states: dict[str, Mapping[str, Any]]

    def places(self) -> Iterator[tuple[Block, int]]:
        """Each layer, and where its entries begin in a vector of the whole."""
        starts = itertools.accumulate((block.d for block in self.layers), initial=0)
        return zip(self.layers, starts, strict=False)


def observe(state: training.TrainingState, setting: training.Settings, examples: int) -> Observed:
    """Copy what is measured at this step; curvature of the first `examples` training examples.

    Raises: AttributeError for an optimizer that shows no preconditioner.
    """
    dtype = next(state.model.parameters()).dtype
    inputs, targets = state.data.train_inputs[:examples], state.data.train_targets[:examples]
    problem = Problem(state.model, setting.problem.loss, inputs, targets, dtype=dtype)
    P = live.preconditioners(state.optimizer, dtype)  # type: ignore[arg-type]
    layers = [block for block in problem.blocks() if block.name in P]
    whole = problem.group("", [block.name for block in layers])
    weights = {block.name: block.parameters[0] for block in layers}
    states = state.optimizer.state
    return Observed(
        problem,
        layers,
        whole,
        P,
        {of: exact.truth(problem, whole, of) for of in TRUTHS},
        {n: states.get(state.model.get_parameter(w), {}) for n, w in weights.items()},
    )


class PrincipalBlock:
    """Principal submatrix (rows and columns `place`) of an operator known by its products."""

    def __init__(self, whole: Operator, place: slice) -> None:
        self.whole, self.place = whole, place
        size = len(range(*place.indices(whole.shape[0])))
        self.like = like(whole).new_zeros(size)
        self.shape = (size, size)

    def __matmul__(self, v: Tensor) -> Tensor:
        padded = self.like.new_zeros(self.whole.shape[0])
        padded[self.place] = v
        return (self.whole @ padded)[self.place]


class Searches:
    """Largest eigenvalues of P C, each search warm-started from the last one with its key."""

    def __init__(self) -> None:
        self.starts: dict[tuple[str, ...], Tensor] = {}

    def value(self, key: tuple[str, ...], C: Operator, P: Callable[[Tensor], Tensor]) -> float:
        """Largest eigenvalue; NaN if P is not positive definite or not finite."""
        try:
            found = sharpest(C, P, self.starts.get(key), tolerance=ENOUGH, products=PRODUCTS)
        except (NotPositiveDefiniteError, NotFiniteError):
            return math.nan
        self.starts[key] = found.dual
        return found.value


def of_the_whole(view: Observed, lr: float, searches: Searches) -> Iterator[Record]:
    """Sharpness λ_max(lr P C) of the whole model, for the Hessian and the GGN."""
    P = side_by_side([view.P[block.name] for block in view.layers])
    for of, C in view.C.items():
        value = lr * searches.value((of, ""), C, P)
        yield row("sharpness", value, size=view.whole.d, truth=of)


def by_layer(view: Observed, lr: float, searches: Searches) -> Iterator[Record]:
    """Sharpness λ_max(lr P C) of each layer's block, for the Hessian and the GGN."""
    for of, C in view.C.items():
        for block, at in view.places():
            part = PrincipalBlock(C, slice(at, at + block.d))
            value = lr * searches.value((of, block.name), part, view.P[block.name].__matmul__)
            yield row("sharpness", value, block=block.name, size=block.d, truth=of)


def efficiency(view: Observed, lr: float, damping: float) -> Iterator[Record]:
    """Decrease of the GGN model by the step lr P g, over the largest possible decrease."""
    g = view.problem.gradient(view.whole).detach()
    P = side_by_side([view.P[block.name] for block in view.layers])
    step = SingleStep(gradient=g, step=lr * P(g))
    found = metrics.decrease_efficiency(view.C["ggn"], step, damping, g, approximation_damping=0.0)
    yield row("decrease_efficiency", found.value, size=view.whole.d, truth="ggn", damping=damping)


def row(metric: str, value: float, **more: Any) -> Record:
    """Columns of a record; by default those of a number about the whole model."""
    return {**loss_row(metric, value), **more}
