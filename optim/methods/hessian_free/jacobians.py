"""Repeated products with the Jacobian of a model's outputs, differentiated once per step."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, linearize
from torch.utils import deterministic

from ...blocks.blocks import owners_of
from ...capture.closures import random_state, replayed
from ...capture.output_jacobian import OutputJacobian

WRONG_SHAPE = (
    "a call of {} with {} of its examples returned shape {}; tensor arguments whose dimension 0 is "
    "the batch are cut to these, and dimension 0 of the output must be the batch too"
)


@dataclass(eq=False)
class Piece:
    """One call of a model on some examples of a batch.

    gradient: of the batch's loss with respect to the output, if known.
    """

    model: nn.Module
    examples: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None

    def output(self) -> Tensor:
        """Output of the call. Raises: ValueError if dimension 0 is not the examples."""
        found = self.model(*copied(self.args), **copied(self.kwargs))
        if found.ndim == 0 or len(found) != self.examples:
            raise ValueError(
                WRONG_SHAPE.format(type(self.model).__name__, self.examples, tuple(found.shape))
            )
        return found

    def output_at(self, part: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """Output of the call with other values of these parameters."""
        at = dict(zip(part, values, strict=True))
        return output_at(self.model, at, copied(self.args), copied(self.kwargs))


def map_leaves(function: Callable[..., Any], value: Any, *beside: Any) -> Any:
    """Apply function(leaf, leaves of `beside` at the same place) in nested lists, tuples, dicts."""
    if isinstance(value, dict):
        return {k: map_leaves(function, v, *(b[k] for b in beside)) for k, v in value.items()}
    if type(value) in (list, tuple):
        pairs = zip(value, *beside, strict=True)
        return type(value)(map_leaves(function, v, *others) for v, *others in pairs)
    return function(value, *beside)


def copied(value: Any) -> Any:
    """Copy all tensors at any depth: models and training loops may write into shared ones."""
    return map_leaves(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, value)


def output_at(
    model: nn.Module, values: dict[Tensor, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Output of the model with other values of some parameters, differentiable by these alone."""
    places = owners_of(model)
    at = {name: values.get(p, p.detach()) for p, names in places.items() for name in names}
    # tie_weights would undo this for all but the first place of a shared parameter
    return functional_call(model, at, args, kwargs, tie_weights=False)


class DoubleBackward(OutputJacobian):
    """Jacobian of a piece by double backward."""

    route = "double backward"

    def __init__(self, piece: Piece, parts: Sequence[Sequence[Tensor]]) -> None:
        with torch.enable_grad():
            super().__init__(piece.output(), parts)


class ForwardMode:
    """Jacobian of a piece by forward mode, which evaluates the model anew for each J v.

    For layers without a second derivative that tracing does not understand (it loses what they
    write in place).
    """

    route = "forward mode"

    def __init__(self, piece: Piece, parts: Sequence[Sequence[Tensor]]) -> None:
        self._piece, self._parts = piece, parts
        self._random = random_state(piece.model)
        with torch.enable_grad():
            self._graph = piece.output()
        self.output = self._graph.detach()

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, in the shape of the output."""
        own = self._parts[part]
        values = tuple(p.detach() for p in own)
        with replayed(self._piece.model, self._random):
            return jvp(lambda *at: self._piece.output_at(own, at), values, tuple(v))[1]

    def back(self, part: int, w: Tensor) -> Sequence[Tensor]:
        """Jᵀw, in the shapes of the part's parameters."""
        return torch.autograd.grad(
            self._graph, self._parts[part], w, retain_graph=True, materialize_grads=True
        )


class Linearised(ForwardMode):
    """Jacobian of a piece by forward mode, traced once; for layers without a second derivative.

    Tracing costs several products.
    """

    route = "linearised forward mode"

    def __init__(self, piece: Piece, parts: Sequence[Sequence[Tensor]]) -> None:
        super().__init__(piece, parts)
        self._maps = [self._linear_map(part) for part in parts]

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, in the shape of the output."""
        with replayed(self._piece.model, self._random):
            return self._maps[part](*v)

    def _linear_map(self, part: Sequence[Tensor]) -> Callable[..., Tensor]:
        values = [p.detach() for p in part]
        with warnings.catch_warnings(), replayed(self._piece.model, self._random):
            # PyTorch warns of its own way of folding constants
            warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
            return linearize(lambda *at: self._piece.output_at(part, at), *values)[1]


Jacobian = DoubleBackward | ForwardMode
Route = type[DoubleBackward] | type[Linearised] | type[ForwardMode]
ROUTES: tuple[Route, ...] = (DoubleBackward, Linearised, ForwardMode)
REFUSED = (
    "the outputs of {model} cannot be differentiated for curvature products: {why}; layers need a "
    "second derivative or a forward-mode one (fused recurrent and attention kernels have neither)"
)


def choose_route(piece: Piece, parts: Sequence[Sequence[Tensor]]) -> Route:
    """The first way of computing J v that is right for this model, tried on one call.

    Right: ⟨w, J v⟩ = ⟨Jᵀw, v⟩ for random v, w; a layer whose derivative cannot be differentiated
    again may break it without an error. Raises: ValueError with the reason of each route.
    """
    reasons = []
    for route in ROUTES:
        try:
            with replayed(piece.model, random_state(piece.model)), _uninitialized_is_nan():
                works = _is_adjoint(route(piece, parts), parts)
            if works:
                return route
            reasons.append(f"{route.route}: wrong products")
        except (RuntimeError, NotImplementedError) as error:
            reasons.append(f"{route.route}: {str(error).splitlines()[0]}")
    why = "; ".join(reasons)
    raise ValueError(REFUSED.format(model=type(piece.model).__name__, why=why))


@contextmanager
def _uninitialized_is_nan() -> Iterator[None]:
    # where tracing has lost an in-place write, such memory may still hold the right values
    settings: Any = deterministic  # a module whose attribute is a property
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    settings.fill_uninitialized_memory = True  # in that mode
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def _is_adjoint(jacobian: Jacobian, parts: Sequence[Sequence[Tensor]]) -> bool:
    generator = torch.Generator(jacobian.output.device).manual_seed(0)
    for number, part in enumerate(parts):
        v = [_random(p, generator) for p in part]
        w = _random(jacobian.output, generator)
        Jv, JTw = jacobian.forward(number, v), jacobian.back(number, w)
        one = (w.double() * Jv.double()).sum()
        other = sum((a.double() * b.double()).sum() for a, b in zip(JTw, v, strict=True))
        # both are about ‖J v‖ for a random w, and so is their difference if a term is missing
        if not abs(one - other) <= 3 * torch.finfo(w.dtype).eps ** 0.5 * Jv.double().norm():
            return False
    return True


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
