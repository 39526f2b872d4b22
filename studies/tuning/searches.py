"""Kinds of searches: the points they train and the pruner that stops the worse ones early."""

import copy
import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from optuna import Study, create_study
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import QMCSampler
from optuna.trial import FrozenTrial, TrialState

from .. import problems
from ..problems import _hyper
from ..reports import comparison_tables
from ..training import trials
from . import grids

ETA = 3  # halving keeps a third: in theory 1/e is best (arXiv:1603.06560, section 2.6)


@dataclass(frozen=True)
class Search(ABC):
    """Search for the settings of an optimizer with the least training loss.

    epochs: of one training; 0: those of the optimizer's schedule on the problem, or the problem's.
    seed: of initialisation, batches and draws. workers: processes.
    """

    NAME: ClassVar[str]
    FIXED: ClassVar[tuple[str, ...]] = ("optimizer", "epochs", "seed")  # a resumed search has these

    problem: str
    optimizer: str = "kbfgs"
    epochs: int = 0
    seed: int = 0
    workers: int = 2
    device: str = "cpu"

    @property
    @abstractmethod
    def searched(self) -> _hyper.Searched:
        """Values of each setting and their source. Raises: ValueError where there are none."""

    def points(self) -> list[dict[str, float]]:
        """All points to train, as {setting: value}: every combination of the values."""
        return grids.points(self.searched.grid)

    def pruner(self) -> BasePruner:
        """Optuna's pruner; this one stops no training early."""
        return NopPruner()

    @property
    def budget(self) -> int:
        """Epochs of a training that is not stopped."""
        return self.epochs or problems.get(self.problem).epochs_of(self.optimizer)

    def trial(self, point: dict[str, float]) -> trials.Trial:
        """The training at a point."""
        own = trials.trial(self.problem, self.optimizer, point, self.seed, self.budget)
        return dataclasses.replace(own, device=self.device)

    def label(self, point: dict[str, float]) -> str:
        """Name of a point in records, tables and figures."""
        return f"{self.optimizer} {comparison_tables.point(point)}"


@dataclass(frozen=True)
class Grid(Search):
    """Grid search: the recommended lr (or kl_clip) and damping times the factors."""

    NAME = "tune_grid"

    lr_factors: Sequence[float] = _hyper.LR_FACTORS
    damping_factors: Sequence[float] = _hyper.DAMPING_FACTORS

    @property
    def searched(self) -> _hyper.Searched:
        """See `grids.axes`. Raises: ValueError where nothing is recommended."""
        factors = self.lr_factors, self.damping_factors
        if found := grids.axes(self.problem, self.optimizer, *factors):
            return _hyper.Searched(found, "around what is recommended")
        raise ValueError(
            f"{self.problem} recommends no lr or damping of {self.optimizer} to search around; it "
            f"does so for {sorted(problems.get(self.problem).optimizers)}"
        )


@dataclass(frozen=True)
class Listed(Search):
    """Grid search over the values that the papers tuned, as the problem lists them."""

    NAME = "tune_searched"

    @property
    def searched(self) -> _hyper.Searched:
        """The problem's `searched`. Raises: ValueError where it lists none."""
        known = problems.get(self.problem).searched
        if self.optimizer not in known:
            raise ValueError(
                f"{self.problem} lists nothing searched of '{self.optimizer}'; it does so of "
                f"{sorted(known)}"
            )
        return known[self.optimizer]


@dataclass(frozen=True)
class Halving(Grid):
    """Asynchronous successive halving (arXiv:1810.05934) of `trials` quasi-random points.

    The points are a scrambled Sobol sequence, log-uniform between the least and the largest factor;
    more trials begin with the same points. After a 27th, a ninth and a third of the epochs (rounded
    up) a training goes on only if it is among the best third of those that got there so far.
    """

    NAME = "tune_halving"
    FIXED = (*Grid.FIXED, "lr_factors", "damping_factors")

    lr_factors: Sequence[float] = (0.03, 30.0)
    damping_factors: Sequence[float] = (0.01, 10.0)
    trials: int = 24

    def points(self) -> list[dict[str, float]]:
        """Different draws, to three digits. Raises: ValueError if there are not that many."""
        ends = {name: (min(values), max(values)) for name, values in self.searched.grid.items()}
        ranges: dict[str, BaseDistribution] = {
            name: FloatDistribution(*end, log=True) for name, end in ends.items()
        }
        with warnings.catch_warnings(action="ignore", category=ExperimentalWarning):
            draws = create_study(sampler=QMCSampler(scramble=True, seed=self.seed))
        found: list[dict[str, float]] = []
        for _ in range(10 * self.trials):
            if len(found) < self.trials:
                draw = draws.ask(ranges).params
                point = {name: float(f"{value:.3g}") for name, value in draw.items()}
                found += [point] if point not in found else []
        if len(found) < self.trials or not found:
            raise ValueError(f"cannot draw {self.trials} different points between {ends}")
        return found

    def pruner(self) -> BasePruner:
        """Optuna's successive halving, with its first rung after a 27th of the epochs."""
        return _Halving(min_resource=-(-self.budget // ETA**3), reduction_factor=ETA)


class _Halving(SuccessiveHalvingPruner):
    """Optuna's pruner, but a killed trial does not count beside its retry."""

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        alive = copy.copy(study)
        states = [state for state in TrialState if state != TrialState.FAIL]
        alive.get_trials = partial(study.get_trials, states=states)  # type: ignore[method-assign]
        return super().prune(alive, trial)
