"""What `studies.tuning.queue` searches: the points, and which trainings are stopped early."""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from .. import problems
from ..problems import _hyper
from ..reports import comparison_tables
from ..training import trials
from ..training.trials import Trial
from .grids import axes

ETA = 3  # halving keeps a third: in theory 1/e is best (arXiv:1603.06560, section 2.6)
RECOMMENDED = "around what is recommended"
CUTS = 3  # so the first is after 1/27 of the epochs: few are cut down for a slow start


def load_optuna() -> Any:
    """Optuna, quiet. Raises: ValueError with the way out where it is missing."""
    try:
        import filelock  # noqa: F401
        import optuna
    except ImportError as error:
        lacks = "tuning needs the extra: pip install '.[tune]' in the checkout"
        raise ValueError(lacks) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


@dataclass(frozen=True)
class Search(ABC):
    """What is tuned, and how long.

    epochs: 0: those of the problem's schedule for the optimizer, or the problem's.
    seed: of initialisation, batches and draws.
    """

    NAME: ClassVar[str]
    FIXED: ClassVar[tuple[str, ...]]  # what a search that goes on must not change

    problem: str
    optimizer: str = "kbfgs"
    epochs: int = 0
    seed: int = 0
    workers: int = 2
    device: str = "cpu"

    @abstractmethod
    def axes(self) -> dict[str, tuple[float, ...]]:
        """The values of each setting that is tuned. Raises: ValueError where there are none."""

    def points(self) -> list[dict[str, float]]:
        """All points to train, in order, as {setting: value}: every combination of the values."""
        axes = self.axes()
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]

    def stops(self, epoch: int, loss: float, others: Sequence[float]) -> bool:  # noqa: ARG002
        """Whether a training ends after this epoch: none; others: losses that others had there."""
        return False

    @property
    @abstractmethod
    def source(self) -> str:
        """Whose values these are, in words."""

    @property
    def budget(self) -> int:
        """Epochs of a training that is not stopped."""
        return self.epochs or problems.get(self.problem).epochs_of(self.optimizer)

    def trial(self, point: dict[str, float]) -> Trial:
        """The training of a point."""
        own = trials.trial(self.problem, self.optimizer, point, self.seed, self.budget)
        return dataclasses.replace(own, device=self.device)

    def label(self, point: dict[str, float]) -> str:
        """What the point is called in the records and figures."""
        return f"{self.optimizer} {comparison_tables.point(point)}"


def around(
    search: Search, lr_factors: Sequence[float], damping_factors: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    """The recommended lr (kl_clip, where it has one) and damping times the factors.

    Raises: ValueError where nothing is recommended; the message says of which optimizers it is.
    """
    factors = lr_factors, damping_factors
    if found := axes(search.problem, search.optimizer, *factors):
        return found
    known = sorted(problems.get(search.problem).optimizers)
    raise ValueError(
        f"{search.problem} recommends no lr or damping of {search.optimizer} to search around; it "
        f"does so for {known}"
    )


@dataclass(frozen=True)
class Grid(Search):
    """Every combination of the factors, each trained to the end.

    lr_factors, damping_factors: times the recommended values, as in `optimizers_compared.Grid`.
    """

    NAME = "tune_grid"
    FIXED = ("optimizer", "epochs", "seed")

    lr_factors: Sequence[float] = _hyper.LR_FACTORS
    damping_factors: Sequence[float] = _hyper.DAMPING_FACTORS

    def axes(self) -> dict[str, tuple[float, ...]]:
        """The recommended values times the factors. Raises: ValueError where there are none."""
        return around(self, self.lr_factors, self.damping_factors)

    @property
    def source(self) -> str:
        """That it lies around what is recommended."""
        return RECOMMENDED


@dataclass(frozen=True)
class Listed(Search):
    """Every combination that the problem lists as searched, each trained to the end.

    What the papers tuned as far as that is known, Adam's ε and weight decays too; `source` says
    whose the values are.
    """

    NAME = "tune_searched"
    FIXED = Grid.FIXED

    def axes(self) -> dict[str, tuple[float, ...]]:
        """The grid of the problem's `searched`. Raises: ValueError where there is none."""
        return dict(self._searched.grid)

    @property
    def source(self) -> str:
        """Whose values these are, as the problem says."""
        return self._searched.source

    @property
    def _searched(self) -> _hyper.Searched:
        known = problems.get(self.problem).searched
        if self.optimizer not in known:
            raise ValueError(
                f"{self.problem} lists nothing searched of '{self.optimizer}'; it does so of "
                f"{sorted(known)}"
            )
        return known[self.optimizer]


@dataclass(frozen=True)
class Halving(Search):
    """`trials` points drawn log-uniformly between the least and the largest factor.

    Successive halving in its asynchronous form (arXiv:1810.05934): after a 27th, a ninth and a
    third of the epochs (rounded up, or from the first epoch on) a training goes on only if it is
    among the best third of those that got there so far. More trials begin with the same points.
    """

    NAME = "tune_halving"
    FIXED = (*Grid.FIXED, "lr_factors", "damping_factors")

    lr_factors: Sequence[float] = (0.03, 30.0)
    damping_factors: Sequence[float] = (0.01, 10.0)
    trials: int = 24

    def axes(self) -> dict[str, tuple[float, ...]]:
        """The recommended values times the factors. Raises: ValueError where there are none."""
        return around(self, self.lr_factors, self.damping_factors)

    def points(self) -> list[dict[str, float]]:
        """Different draws, with three digits. Raises: ValueError if there are not that many."""
        ends = {name: (min(values), max(values)) for name, values in self.axes().items()}
        low, high = np.log(list(ends.values())).T
        random, found = np.random.default_rng(self.seed), dict[tuple[float, ...], None]()
        for _ in range(100 * self.trials):
            if len(found) < self.trials:
                draw = np.exp(random.uniform(low, high))
                found[tuple(float(f"{value:.3g}") for value in draw)] = None
        if len(found) < self.trials or not found:
            raise ValueError(f"cannot draw {self.trials} different points between {ends}")
        return [dict(zip(ends, point, strict=True)) for point in found]

    def stops(self, epoch: int, loss: float, others: Sequence[float]) -> bool:
        """Whether it is time to look, and the loss is not among the best third.

        While that is less than one training the best goes on. Optuna's own pruner would also count
        what trainings had that were killed and are trained again.
        """
        first = -(-self.budget // ETA**CUTS)
        if epoch not in [first * ETA**look for look in range(CUTS + 1)]:
            return False
        losses = sorted([*others, loss])
        return loss > losses[max(len(losses) // ETA, 1) - 1]

    @property
    def source(self) -> str:
        """That it lies around what is recommended."""
        return RECOMMENDED
