"""Estimate: a number with its interval and the count of examples behind it."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured value, its 95 % interval [low, high], and n, the examples behind it.

    `value` is exact for the batch the problem holds. The interval is for the value typical of
    batches of the same size from the same source, the approximation held fixed; for metrics named
    `population_*` it is for the population's value. (Batches of one size differ from the population
    on average: their norms contain the sampling noise.) What simulations found of the 95 % stands
    in `statistics.intervals` and with the metric. Where nothing is known of the examples (a truth
    given as one dense matrix) low and high are NaN: no interval is claimed.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"
