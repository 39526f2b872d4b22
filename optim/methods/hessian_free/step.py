"""From the solutions of conjugate gradients to the step: which iterate, how far, what damping next.

Source: Martens 2010, section 4; the constants as we recall them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.levenberg_marquardt import adapted, reduction_ratio
from .conjugate_gradients import System
from .objective import Objective
from .options import LineSearch, Options


@dataclass(eq=False)
class Choice:
    """Solutions x of all systems, φ summed over them, and the loss there, None if not known."""

    x: list[Tensor]
    phi: Tensor
    value: Tensor | None = None

    def step(self, systems: Sequence[System]) -> list[Tensor]:
        """One tensor for each parameter."""
        return [part for s, x in zip(systems, self.x, strict=True) for part in s.split(x)]


def last(systems: Sequence[System]) -> Choice:
    """Where conjugate gradients ended."""
    return Choice([s.x for s in systems], sum_of([s.phi[-1] for s in systems]))


def search(
    systems: Sequence[System],
    objective: Objective,
    groups: Sequence[dict[str, Any]],
    options: Options,
    factor: Tensor,
) -> tuple[Choice, float]:
    """The iterate to take and the share of it, after `factor` of the damping has been adapted.

    groups: of each parameter.
    """
    choice = backtracked(systems, objective) if options.backtracking else last(systems)
    if options.adaptive is not None:
        if choice.value is None:
            choice.value = objective.at(choice.step(systems))
        predicted = choice.phi
        if not options.adaptive.damped_model:
            predicted = predicted - damping_term(choice.step(systems), groups, factor)
        rho = reduction_ratio(choice.value - objective.here, predicted)
        factor.copy_(adapted(factor, rho, options.adaptive.omega))
    if options.line_search is None:
        return choice, 1.0
    rates = [group["lr"] for group in groups]
    return choice, line_searched(systems, choice, objective, rates, options.line_search)


def backtracked(systems: Sequence[System], objective: Objective) -> Choice:
    """The last iterate, or the first before it whose predecessor's loss is not lower."""
    best = last(systems)
    best.value = objective.at(best.step(systems))
    for kept in reversed(list(zip(*(s.iterates for s in systems), strict=True))):
        earlier = Choice([x for x, _ in kept], sum_of([phi for _, phi in kept]))
        if all(torch.equal(a, b) for a, b in zip(earlier.x, best.x, strict=True)):
            continue  # conjugate gradients had ended by then
        earlier.value = objective.at(earlier.step(systems))
        if torch.isfinite(best.value) and not earlier.value < best.value:
            break
        best = earlier
    return best


def line_searched(
    systems: Sequence[System],
    choice: Choice,
    objective: Objective,
    rates: Sequence[float],
    rule: LineSearch,
) -> float:
    """The share of the step at these learning rates that lowers the loss enough; 0 if none does."""
    step = [part * rate for part, rate in zip(choice.step(systems), rates, strict=True)]
    gradients = [part for s in systems for part in s.split(s.g)]
    slope = sum_of([(g * s).sum() for g, s in zip(gradients, step, strict=True)])
    share = 1.0
    value = choice.value if all(rate == 1 for rate in rates) else None
    for _ in range(rule.tries):
        if value is None:
            value = objective.at([share * part for part in step])
        if bool(value <= objective.here + rule.slope * share * slope):
            return share
        share, value = share * rule.shrink, None
    return 0.0


def damping_term(
    step: Sequence[Tensor], groups: Sequence[dict[str, Any]], factor: Tensor
) -> Tensor:
    """½ Σ λ ‖d‖², 0-d float64."""
    pairs = zip(step, groups, strict=True)
    return 0.5 * factor * sum_of([group["damping"] * d.square().sum() for d, group in pairs])


def sum_of(scalars: Sequence[Tensor]) -> Tensor:
    """Their sum, 0-d float64."""
    return torch.stack([scalar.double() for scalar in scalars]).sum()
