"""Grids of hyper-parameters around a problem's recommended settings, and their trainings."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from .. import problems
from ..problems import _hyper
from ..training import trials
from ..training.optimizers import OPTIMIZERS
from ..training.trials import Trial


def axes(
    problem: str, optimizer: str, lr_factors: Sequence[float], damping_factors: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    """Values {setting: values} to search: the recommended ones times the factors.

    See `_hyper.around`. Raises: ValueError for an unknown problem or optimizer.
    """
    recommended = problems.get(problem).optimizers.get(optimizer, {})
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{optimizer}'; known: {sorted(OPTIMIZERS)}")
    return _hyper.around(recommended, lr_factors, damping_factors)


def points(values: Mapping[str, Sequence[float]]) -> list[dict[str, float]]:
    """All combinations of the values, each as {setting: value}; the last setting varies fastest.

    >>> points({"lr": (1.0, 2.0), "damping": (0.1,)})
    [{'lr': 1.0, 'damping': 0.1}, {'lr': 2.0, 'damping': 0.1}]
    """
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def candidates(
    problem: str,
    optimizer: str,
    lr_factors: Sequence[float],
    damping_factors: Sequence[float],
    seed: int,
    epochs: int,
    device: str,
) -> list[Trial]:
    """One training for each point of the grid. Raises: as `axes`."""
    grid = points(axes(problem, optimizer, lr_factors, damping_factors))
    own = [trials.trial(problem, optimizer, point, seed, epochs) for point in grid]
    return [dataclasses.replace(trial, device=device) for trial in own]
