"""Registries of approximations and metrics: a dictionary that is also the decorator filling it."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from inspect import signature
from pkgutil import iter_modules
from typing import Any, Generic, TypeVar

from .operators.pairing import of_one_size_and_dtype

E = TypeVar("E")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Approximation:
    """What an approximation (problem, block, of=..., ...) -> Operator declares of itself.

    kind: "curvature" or "preconditioner".
    damping_inside: damped metrics take it as it is, with approximation_damping=0.
    exact_on: names of cases (tests/diag/conftest.py) on which theory makes it equal to the truth.
    """

    function: Callable[..., Any]
    reference: str
    kind: str = "curvature"
    exact_on: tuple[str, ...] = ()
    damping_inside: bool = False

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__

    @cached_property
    def of(self) -> str:
        """Name of the truth approximated unless told otherwise: the default of the keyword."""
        default: str = signature(self.function).parameters["of"].default
        return default


@dataclass(frozen=True)
class Metric:
    """What a metric (truth, approximation, ...) -> Estimate declares of itself."""

    function: Callable[..., Any]
    formula: str
    range: str
    best: str
    reference: str

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.function.__name__

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Names of the keywords without a default."""
        keywords = list(signature(self.function).parameters.values())[2:]
        return tuple(each.name for each in keywords if each.default is each.empty)


class Registry(dict[str, E], Generic[E]):
    """{name: entry}; called with an entry's fields, a decorator that registers a function.

    wrap: what each function is wrapped in. replaced: {former name: what to use instead}.
    """

    def __init__(
        self,
        noun: str,
        entry: Callable[..., E],
        wrap: Callable[[Any], Any] = lambda function: function,
        replaced: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.noun, self.entry, self.wrap, self.replaced = noun, entry, wrap, replaced or {}

    def __call__(self, **fields: Any) -> Callable[[F], F]:
        """Register the decorated function under its own name."""

        def register(function: F) -> F:
            wrapped: F = self.wrap(function)
            self[wrapped.__name__] = self.entry(wrapped, **fields)
            return wrapped

        return register

    def __missing__(self, name: str) -> E:
        raise ValueError(self.missing(name))

    def missing(self, name: str) -> str:
        """Error message for an unknown name: what replaced it, or the names known."""
        if name in self.replaced:
            return f"{self.noun} '{name}' was removed; use {self.replaced[name]}"
        return f"no {self.noun} '{name}'; known: {sorted(self)}"

    def load(self, package: str, path: Iterable[str]) -> None:
        """Import all modules of a package, each of which registers its functions."""
        for module in iter_modules(path):
            import_module(f"{package}.{module.name}")


approximation = Registry(
    "approximation",
    Approximation,
    replaced={
        "layer_blocks": "groups(problem, block)",
        "diagonal_fisher": "diagonal(problem, block, of='fisher')",
        "diagonal_empirical": "diagonal(problem, block, of='empirical_fisher')",
    },
)
metric = Registry("metric", Metric, wrap=of_one_size_and_dtype)
