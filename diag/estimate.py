"""Estimate: a measured number with its confidence interval and sample count."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A measured value, its 95 % interval [low, high] and the number n of examples.

    `value` is exact for the problem's batch. The interval is for the value typical of batches of
    this size, the approximation held fixed; for metrics named `population_*` it is for the
    population's value. (The two differ: a batch's norms contain its sampling noise.) Simulated
    coverage: `statistics.intervals` and the metrics. low and high are NaN where single examples are
    not known (a truth given as one dense matrix).
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 0

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}] (n = {self.n})"
