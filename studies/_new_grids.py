"""The values that are tuned, and the trials of a grid."""

from collections.abc import Sequence

from studies import hyper, problems
from studies.optimizers import OPTIMIZERS


def axes(
    problem: str, optimizer: str, lr_factors: Sequence[float], damping_factors: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    """What is tuned: {setting: its values}, as `hyper.around` gives them.

    Raises: ValueError for an unknown problem or optimizer.
    """
    recommended = problems.get(problem).optimizers.get(optimizer, {})
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{optimizer}'; known: {sorted(OPTIMIZERS)}")
    return hyper.around(recommended, lr_factors, damping_factors)
