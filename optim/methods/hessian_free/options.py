"""What HessianFree may be asked to do beside its fixed settings, each with its constants.

Source: Martens 2010, Deep learning via Hessian-free optimization; the constants as we recall them.
"""

from dataclasses import dataclass

from ...core import settings
from .conjugate_gradients import RelativeProgress


@dataclass(frozen=True)
class AdaptiveDamping:
    """λ <- λ / omega if ρ < 1/4, omega λ if ρ > 3/4, after every step.

    ρ = (f(θ + d) - f(θ)) / φ(d), f with its L2 term. damped_model: whether φ contains ½ λ ‖d‖²;
    accounts differ, and without it ρ is 1 on a quadratic whatever λ.

    Raises: ValueError for a bad setting.
    """

    omega: float = 2 / 3
    damped_model: bool = False

    def __post_init__(self) -> None:
        settings.positive("omega", self.omega)
        settings.fraction("omega", self.omega)


@dataclass(frozen=True)
class Backtracking:
    """Go back from the last CG iterate to earlier ones while the loss is lower there.

    Kept are the iterates 1, ... each `spacing` times further than the one before.

    Raises: ValueError for a bad setting.
    """

    spacing: float = 1.3

    def __post_init__(self) -> None:
        if not 1 < self.spacing < float("inf"):
            raise ValueError(f"spacing must be a number above 1, got {self.spacing!r}")

    def kept(self, limit: int) -> list[int]:
        """The iterations to keep, in ascending order.

        >>> Backtracking(1.3).kept(12)
        [1, 2, 3, 4, 5, 6, 8, 11]
        """
        found: list[int] = []
        place = 1.0
        while round(place) <= limit:
            if not found or round(place) > found[-1]:
                found.append(round(place))
            place *= self.spacing
        return found


@dataclass(frozen=True)
class LineSearch:
    """Step rate · lr d, rate = 1, shrink, shrink², ... until the loss has fallen enough.

    Enough (Armijo): f(θ + rate lr d) <= f(θ) + slope rate lr gᵀd. After so many `tries` nothing
    moves, which is counted as "line search failed".

    Raises: ValueError for a bad setting.
    """

    slope: float = 1e-2
    shrink: float = 0.8
    tries: int = 60

    def __post_init__(self) -> None:
        settings.fraction("slope", self.slope)
        settings.positive("shrink", self.shrink)
        settings.fraction("shrink", self.shrink)
        settings.at_least_one("tries", self.tries)


@dataclass(frozen=True)
class DiagonalPreconditioner:
    """CG preconditioned by (mean_n ∇ℓ_n ∘ ∇ℓ_n + λ)^power, over the curvature batch.

    One gradient for each example, `at_once` of them held at a time.

    Raises: ValueError for a bad setting.
    """

    power: float = 0.75
    at_once: int = 64

    def __post_init__(self) -> None:
        settings.not_negative("power", self.power)
        settings.at_least_one("at_once", self.at_once)


@dataclass(frozen=True)
class Options:
    """Those that one optimizer was given; None is without."""

    stop: RelativeProgress | None
    preconditioner: DiagonalPreconditioner | None
    backtracking: Backtracking | None
    line_search: LineSearch | None
    adaptive: AdaptiveDamping | None

    @property
    def evaluates(self) -> bool:
        """Whether the loss is computed again."""
        return any((self.backtracking, self.line_search, self.adaptive))
