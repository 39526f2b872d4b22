"""The values that are tuned, and the trials of a grid."""

from collections.abc import Sequence

from .. import problems
from ..problems import _hyper
from ..training.optimizers import OPTIMIZERS


def axes(
    problem: str, optimizer: str, lr_factors: Sequence[float], damping_factors: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    """What is tuned: {setting: its values}, as `_hyper.around` gives them.

    Raises: ValueError for an unknown problem or optimizer.
    """
    recommended = problems.get(problem).optimizers.get(optimizer, {})
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{optimizer}'; known: {sorted(OPTIMIZERS)}")
    return _hyper.around(recommended, lr_factors, damping_factors)
