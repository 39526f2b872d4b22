"""Registries: a decorator that is also the dictionary of all it decorated."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from .operators.pairing import of_one_size_and_dtype

E = TypeVar("E")
F = TypeVar("F", bound=Callable[..., Any])


class Registry(dict[str, E], Generic[E]):
    """{name: entry}; a missing name gives an error that lists those known."""

    def __init__(self, noun: str) -> None:
        super().__init__()
        self.noun = noun

    def __missing__(self, name: str) -> E:
        raise ValueError(f"no {self.noun} '{name}'; known: {sorted(self)}")


@dataclass(frozen=True)
class Approximation:
    """What an approximation declares of itself.

    of: the truth it approximates unless told otherwise. kind: "curvature" or "preconditioner".
    damping_inside: damped metrics take it as it is, with approximation_damping=0.
    exact_on: names of cases (tests/diag/conftest.py) on which theory makes it equal to the truth.
    """

    name: str
    function: Callable[..., Any]
    of: str
    kind: str
    reference: str
    exact_on: tuple[str, ...]
    damping_inside: bool = False


@dataclass(frozen=True)
class Metric:
    """What a metric declares of itself; needs: names of the keywords it cannot do without."""

    name: str
    function: Callable[..., Any]
    formula: str
    range: str
    best: str
    reference: str
    needs: tuple[str, ...] = ()


class _Approximations(Registry[Approximation]):
    def __call__(
        self,
        name: str,
        *,
        of: str,
        kind: str,
        reference: str,
        exact_on: tuple[str, ...] = (),
        damping_inside: bool = False,
    ) -> Callable[[F], F]:
        """Register the decorated function (problem, block, ...) -> Operator."""

        def register(function: F) -> F:
            self[name] = Approximation(
                name, function, of, kind, reference, exact_on, damping_inside
            )
            return function

        return register


class _Metrics(Registry[Metric]):
    def __call__(
        self,
        name: str,
        *,
        formula: str,
        range: str,
        best: str,
        reference: str,
        needs: tuple[str, ...] = (),
    ) -> Callable[[F], F]:
        """Register the decorated function (truth, operator, ...) -> Estimate.

        What is registered and returned asks it of a pair that fits: see `diag.operators.pairing`.
        """

        def register(function: F) -> F:
            asked = of_one_size_and_dtype(function)
            self[name] = Metric(name, asked, formula, range, best, reference, needs)
            return asked

        return register


approximation = _Approximations("approximation")
metric = _Metrics("metric")
