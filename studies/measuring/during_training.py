"""Measure curvature during a training, within a share of its time."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..training.loop import Settings
from ..training.state import TrainingState
from . import measurement, snapshots

# what costs little next to the training: no factorisation of a block
METRICS = ("relative_error", "relative_error_best_scale", "cosine")


@dataclass
class DuringTraining:
    """Measure the optimizer's and KFAC's curvature against exact GGN blocks, at some epochs.

    Blocks of Linear layers and convolutions; which are not measured is in `summary`.

    share: of the run's time (training and measuring), in (0, 1); evaluating losses is in neither.
    A measurement is left out where with it, as long as the last one took, the share would be
    exceeded. The first one is always taken, nobody knowing how long it takes, and may exceed it:
    what was spent in the end is in `summary`.

    Raises: ValueError for a share outside (0, 1).
    """

    share: float
    seconds: float = 0.0
    last: float = 0.0
    taken: int = 0
    left_out: int = 0
    not_measured: list[str] = field(default_factory=list)
    plan: measurement.Plan = field(
        default_factory=lambda: measurement.Plan(
            truths=("ggn",), approximations=("kfac",), metrics=METRICS
        )
    )

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"measuring takes a share in (0, 1) of a run's time, not {self.share}")

    def allows(self, training: float) -> bool:
        """Whether another measurement stays within the share after `training` seconds.

        >>> beside = DuringTraining(0.2, seconds=3.0, last=3.0)
        >>> beside.allows(20.0), beside.allows(24.0)
        (False, True)
        """
        spent = self.seconds + self.last
        return spent <= self.share * (training + spent)

    def rows(
        self, settings: Settings, state: TrainingState, losses: dict[str, float]
    ) -> list[dict[str, Any]]:
        """Records of this step (without run and study), losses included; [] if left out.

        Measured in another process with one thread, on a copy: the run is not disturbed. To make
        the copy counts as measuring.
        """
        if not self.allows(state.seconds):
            self.left_out += 1
            return []
        begun = time.perf_counter()
        snapshot = snapshots.take(settings, state, self.plan, losses, keep_matrices=False)
        (found,) = snapshots.measure_all([snapshot], count=1)
        self.last = time.perf_counter() - begun
        self.seconds += self.last
        self.taken += 1
        self.not_measured = found.left_out
        return found.rows

    def counters(self) -> dict[str, float]:
        """Seconds and measurements so far, for the header; read back by `resume`."""
        return {name: getattr(self, name) for name in ("seconds", "last", "taken", "left_out")}

    def resume(self, counters: Mapping[str, float]) -> None:
        """Continue from the `counters` of the run's earlier part, if it has any."""
        for name, value in counters.items():
            setattr(self, name, value)

    def summary(self, training: float) -> str:
        """Measurements made and their share of the time, as text."""
        whole = training + self.seconds
        spent = self.seconds / whole if whole else 0.0
        said = f"measured {self.taken} time(s) in {spent:.1%} of the run's time"
        if self.left_out:
            said += f", left out {self.left_out} time(s) to stay within {self.share:.0%}"
        if self.not_measured:
            said += f"; not the blocks {', '.join(self.not_measured)}: they are no matrix [W, b]"
        return said
