"""Products with the Jacobian of a model's outputs, many of them at the same parameters.

The outputs are differentiated once a step; each product J v and Jᵀw then costs the arithmetic of
the linear map alone. For a part of the parameters it goes through what lies between these and the
outputs and nothing else: all parts of a chain of B equal ones take (B + 1) / 2 times the products
of crossing it once, beside their own, instead of B times everything.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, linearize
from torch.utils import deterministic

from ...blocks.blocks import owners_of
from ...capture.closures import random_state, replayed

WRONG_SHAPE = (
    "a call of {} with {} of its examples returned shape {}; tensor arguments whose dimension 0 is "
    "the batch are cut to these, and dimension 0 of the output must be the batch too"
)


@dataclass(frozen=True, eq=False)
class Piece:
    """One call of a model, on so many examples that are all part of one batch.

    gradient: that of the batch's loss by the output, as far as it is known.
    """

    model: nn.Module
    examples: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    gradient: Tensor | None = None

    def output(self) -> Tensor:
        """What the model returns. Raises: ValueError if dimension 0 is not the examples."""
        found = self.model(*copied(self.args), **copied(self.kwargs))
        if found.ndim == 0 or len(found) != self.examples:
            raise ValueError(
                WRONG_SHAPE.format(type(self.model).__name__, self.examples, tuple(found.shape))
            )
        return found

    def output_at(self, part: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
        """The same with other values of these parameters, wherever they stand in the model."""
        at = dict(zip(part, values, strict=True))
        return output_at(self.model, at, copied(self.args), copied(self.kwargs))


def copied(value: Any) -> Any:
    """Copies of all tensors, at any depth: models and loops may write into what they share."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(one) for name, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(copied(one) for one in value)
    return value


def output_at(
    model: nn.Module, values: dict[Tensor, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """What the model returns with other values of some parameters, no other differentiable."""
    places = owners_of(model)
    at = {name: values.get(p, p.detach()) for p, names in places.items() for name in names}
    # it would take a parameter that stands in several places back after the first of them
    return functional_call(model, at, args, kwargs, tie_weights=False)


class Jacobian(Protocol):
    """The derivative of a piece's output by the parameters, part by part.

    route: how J v is computed, in words.
    """

    route: str
    output: Tensor

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, like the output, v like the parameters of the part."""
        ...

    def back(self, part: int, w: Tensor) -> Sequence[Tensor]:
        """Jᵀw, like the parameters of the part; w like the output."""
        ...


class DoubleBackward:
    """J v as the slope in u of Jᵀu, whose graph is made once: reverse mode alone."""

    route = "double backward"

    def __init__(self, piece: Piece, parts: Sequence[Sequence[Tensor]]) -> None:
        self._parts = parts
        with torch.enable_grad():
            self._output = piece.output()
            every = [p for part in parts for p in part]
            self._u = torch.zeros_like(self._output, requires_grad=True)
            slopes = iter(
                torch.autograd.grad(
                    self._output, every, self._u, create_graph=True, allow_unused=True
                )
            )
        self._slopes = [[next(slopes) for _ in part] for part in parts]
        self.output = self._output.detach()

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, like the output."""
        pairs = zip(self._slopes[part], v, strict=True)
        used = [(slope, one) for slope, one in pairs if slope is not None and slope.requires_grad]
        if not used:
            return torch.zeros_like(self.output)
        slopes, directions = zip(*used, strict=True)
        return torch.autograd.grad(slopes, self._u, directions, retain_graph=True)[0]

    def back(self, part: int, w: Tensor) -> Sequence[Tensor]:
        """Jᵀw, like the parameters of the part."""
        return _back(self._output, self._parts[part], w)


class Linearised:
    """J v by forward-mode differentiation, traced once and cleared of what does not depend on v.

    Tracing takes some times as long as a product; for layers without a second derivative.
    """

    route = "linearised forward mode"

    def __init__(self, piece: Piece, parts: Sequence[Sequence[Tensor]]) -> None:
        self._parts, self._model = parts, piece.model
        self._random = random_state(piece.model)
        with torch.enable_grad():
            self._output = piece.output()
        self.output = self._output.detach()
        self._maps = [self._linear_map(piece, part) for part in parts]

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, like the output."""
        with replayed(self._model, self._random):
            return self._maps[part](*v)

    def back(self, part: int, w: Tensor) -> Sequence[Tensor]:
        """Jᵀw, like the parameters of the part."""
        return _back(self._output, self._parts[part], w)

    def _linear_map(self, piece: Piece, part: Sequence[Tensor]) -> Callable[..., Tensor]:
        values = [p.detach() for p in part]
        with warnings.catch_warnings(), replayed(self._model, self._random):
            # about its own way of folding constants
            warnings.filterwarnings("ignore", message="Attempted to insert a get_attr Node")
            return linearize(lambda *at: piece.output_at(part, at), *values)[1]


class ForwardMode:
    """J v by forward-mode differentiation, with the outputs computed anew each time.

    For layers that tracing does not understand either: it loses what they write in place.
    """

    route = "forward mode"

    def __init__(self, piece: Piece, parts: Sequence[Sequence[Tensor]]) -> None:
        self._piece, self._parts = piece, parts
        self._random = random_state(piece.model)
        with torch.enable_grad():
            self._output = piece.output()
        self.output = self._output.detach()

    def forward(self, part: int, v: Sequence[Tensor]) -> Tensor:
        """J v, like the output."""
        own = self._parts[part]
        values = tuple(p.detach() for p in own)
        with replayed(self._piece.model, self._random):
            return jvp(lambda *at: self._piece.output_at(own, at), values, tuple(v))[1]

    def back(self, part: int, w: Tensor) -> Sequence[Tensor]:
        """Jᵀw, like the parameters of the part."""
        return _back(self._output, self._parts[part], w)


def _back(output: Tensor, part: Sequence[Tensor], w: Tensor) -> Sequence[Tensor]:
    return torch.autograd.grad(output, part, w, retain_graph=True, materialize_grads=True)


Route = type[DoubleBackward] | type[Linearised] | type[ForwardMode]
ROUTES: tuple[Route, ...] = (DoubleBackward, Linearised, ForwardMode)
REFUSED = (
    "the outputs of {model} cannot be differentiated for curvature products: {why}; layers need a "
    "second derivative or a forward-mode one (fused recurrent and attention kernels have neither)"
)


def choose_route(piece: Piece, parts: Sequence[Sequence[Tensor]]) -> Route:
    """The first route that works for this model, tried on one call of it.

    Works: ⟨w, J v⟩ = ⟨Jᵀw, v⟩ for random v, w, which a layer with a derivative that cannot be
    differentiated again may break without an error. The generators end as they were: the same
    dropout masks follow with a route chosen before.

    Raises: ValueError saying why each route does not.
    """
    reasons = []
    for route in ROUTES:
        try:
            with replayed(piece.model, random_state(piece.model)), _nothing_right_by_luck():
                works = _is_adjoint(route(piece, parts), parts)
            if works:
                return route
            reasons.append(f"{route.route}: wrong products")
        except (RuntimeError, NotImplementedError) as error:
            reasons.append(f"{route.route}: {str(error).splitlines()[0]}")
    why = "; ".join(reasons)
    raise ValueError(REFUSED.format(model=type(piece.model).__name__, why=why))


@contextmanager
def _nothing_right_by_luck() -> Iterator[None]:
    """Inside, memory that nobody has written to holds NaN.

    Where tracing has lost what a layer writes in place, it may still hold what is missing.
    """
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
