"""What `studies.tuning` searches: the points, and which trainings are stopped early."""

import dataclasses
import itertools
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from studies import optimizers_compared, problems, trials
from studies.comparison import settings as in_print
from studies.trials import Trial

if TYPE_CHECKING:
    import optuna

ETA = 3  # halving keeps a third: in theory 1/e is best (arXiv:1603.06560, section 2.6)
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
    """What is tuned: lr (kl_clip, where it has one) and damping around the recommended values.

    lr_factors, damping_factors: times those, as in `optimizers_compared.Grid`.
    seed: of initialisation, batches and draws.
    """

    NAME: ClassVar[str]
    FIXED: ClassVar[tuple[str, ...]]  # what a search that goes on must not change

    problem: str
    optimizer: str = "kbfgs"
    epochs: int = 0  # 0: those of the problem's schedule for the optimizer, or the problem's
    seed: int = 0
    lr_factors: Sequence[float] = ()
    damping_factors: Sequence[float] = ()
    workers: int = 2
    device: str = "cpu"

    @abstractmethod
    def points(self) -> list[dict[str, float]]:
        """All points to train, in order, as {setting: value}."""

    @abstractmethod
    def pruner(self) -> "optuna.pruners.BasePruner":
        """What stops trainings early."""

    @property
    def budget(self) -> int:
        """Epochs of a training that is not stopped."""
        return self.epochs or problems.get(self.problem).epochs_of(self.optimizer)

    def axes(self) -> dict[str, list[float]]:
        """The recommended values times the factors. Raises: ValueError where there are none."""
        factors = (self.lr_factors, self.damping_factors)
        if found := optimizers_compared.axes(self.problem, self.optimizer, *factors):
            return found
        known = sorted(problems.get(self.problem).optimizers)
        raise ValueError(
            f"{self.problem} recommends no lr or damping of {self.optimizer} to search around; it "
            f"does so for {known}"
        )

    def trial(self, point: dict[str, float]) -> Trial:
        """The training of a point."""
        own = trials.trial(self.problem, self.optimizer, point, self.seed, self.budget)
        return dataclasses.replace(own, device=self.device)

    def label(self, point: dict[str, float]) -> str:
        """What the point is called in the records and figures."""
        return f"{self.optimizer} {in_print(list(point.items()), [])}"


@dataclass(frozen=True)
class Grid(Search):
    """Every combination of the factors, each trained to the end."""

    NAME = "tune_grid"
    FIXED = ("optimizer", "epochs", "seed")

    lr_factors: Sequence[float] = (0.1, 0.3, 1.0, 3.0, 10.0)
    damping_factors: Sequence[float] = (0.03, 0.1, 0.3, 1.0, 3.0)

    def points(self) -> list[dict[str, float]]:
        """The product of the axes."""
        axes = self.axes()
        return [dict(zip(axes, point, strict=True)) for point in itertools.product(*axes.values())]

    def pruner(self) -> "optuna.pruners.BasePruner":
        """Stops none."""
        return load_optuna().pruners.NopPruner()


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

    def pruner(self) -> "optuna.pruners.BasePruner":
        """Asynchronous successive halving; its resource is the epoch."""
        return load_optuna().pruners.SuccessiveHalvingPruner(
            min_resource=-(-self.budget // ETA**CUTS), reduction_factor=ETA
        )
