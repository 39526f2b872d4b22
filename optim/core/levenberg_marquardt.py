"""Levenberg-Marquardt rules: damping adapted by the quality of the quadratic model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from . import settings

HIGH, LOW = 0.75, 0.25  # ρ above: less damping; below: more
BOUNDS = 1e-12, 1e12  # of both factors, so that they find the way back


@dataclass(frozen=True)
class LevenbergMarquardt:
    """Constants by which KFAC2015 adapts λ, the damping of its model, and γ, that of the factors.

    At each multiple of `period` λ <- omega λ if ρ > 3/4 and λ / omega if ρ < 1/4; ρ is the change
    of loss and L2 term over what the model without λ foresaw, so that it is 1 on a quadratic. At
    each multiple of `gamma_period` γ <- the best of γ, gamma_omega γ, γ / gamma_omega by the
    damped model; inverses follow as they are refreshed. Both first after step 0.

    Raises: ValueError for a bad setting.
    Source: arXiv:1503.05671, sections 6.5 and 6.6; its defaults as we recall them.
    """

    period: int = 5
    omega: float = (19 / 20) ** 5
    gamma_period: int = 20
    gamma_omega: float = (19 / 20) ** 10

    def __post_init__(self) -> None:
        for name in ("period", "gamma_period"):
            settings.at_least_one(name, getattr(self, name))
        for name in ("omega", "gamma_omega"):
            settings.positive(name, getattr(self, name))
            settings.fraction(name, getattr(self, name))


def reduction_ratio(actual: Tensor, predicted: Tensor) -> Tensor:
    """ρ = actual / predicted change of the objective, 0-d.

    -inf if the new loss is not finite; NaN, which changes nothing, if no decrease was predicted
    (a gradient of zero, or a step that was left out).

        >>> reduction_ratio(torch.tensor(-1.0), torch.tensor(-2.0)).item()
        0.5
    """
    ratio = torch.where(torch.isfinite(actual), actual / predicted, -torch.inf)
    return torch.where(predicted < 0, ratio, torch.nan)


def adapted(factor: Tensor, rho: Tensor, omega: float) -> Tensor:
    """The factor of λ after ρ, 0-d."""
    change = torch.where(rho > HIGH, omega, torch.where(rho < LOW, 1 / omega, 1.0))
    return (factor * change).clamp(*BOUNDS)


def trials(omega: float) -> tuple[float, float, float]:
    """What γ is multiplied with in a search; the first leaves it."""
    return 1.0, omega, 1 / omega


def best_trial(factor: Tensor, values: Tensor, omega: float) -> Tensor:
    """The factor of γ after the trials gave the model these values [3]; NaN never wins."""
    best = values.nan_to_num(torch.inf, torch.inf).argmin()
    change = torch.where(best == 1, omega, torch.where(best == 2, 1 / omega, 1.0))
    return (factor * change).clamp(*BOUNDS)
