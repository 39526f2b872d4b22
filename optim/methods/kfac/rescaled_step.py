"""The step of KFAC2015, with exact rescaling: θ <- θ + lr (α Δ + μ δ), Δ = -P ∇, δ the last step.

Source: arXiv:1503.05671, sections 6.4 to 7.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...capture.closures import RandomState, cut_output, parameters_at_rest
from ...core import distributed
from ...core.harness import Harness
from ...core.levenberg_marquardt import (
    LevenbergMarquardt,
    adapted,
    best_trial,
    reduction_ratio,
    trials,
)
from ...core.stacks import Stack
from ...linalg.basics import factor_dtype, known_true
from .moving import Live, Moving, Movings, gather, move_
from .rescaling import FisherProducts, Quadratic, best_in_plane, run_again

# (stack, M [size, out, in+1], factor) -> P M: with the inverses held now, or, given a factor, with
# those that γ times it would give
Precondition = Callable[[Stack, Tensor, float | None], Tensor]
SCALARS = {"lambda": 1.0, "gamma": 1.0, "rho": torch.nan, "alpha": torch.nan, "mu": torch.nan}
OTHER_LOSS = (
    "the closure's two calls at the same parameters gave the losses {} and {}: both must use the "
    "same batch, so draw it outside the closure"
)


@dataclass(eq=False)
class Batch:
    """The closure, the random state before its first call, and the loss of that call."""

    closure: Callable[[], Tensor]
    start: RandomState
    loss: Tensor


def check_groups(groups: list[dict[str, Any]]) -> None:
    """Raise ValueError for parameter groups that do not go with rescaling, or many processes."""
    rates = [float(group["lr"]) for group in groups]
    if len(set(rates)) > 1:
        raise ValueError(
            f"KFAC2015 finds one step size for all parameters: lr must be the same in all "
            f"groups, got {rates}"
        )
    if any(group["decoupled_weight_decay"] and group["weight_decay"] for group in groups):
        raise ValueError(
            "KFAC2015 has weight decay as an L2 term in its model of the loss; "
            "decoupled_weight_decay=True does not go with it"
        )
    distributed.alone("KFAC2015", "use KFAC, or train in one process")


class RescaledStep:
    """The scalars of the rescaled step and its loop; `precondition` brings the method's P.

    state: "lambda" and "gamma", by which the groups' damping and √(damping + weight_decay) are
    multiplied; "rho", "alpha", "mu" as last measured, NaN before. All 0-d, float64.
    """

    def __init__(self, harness: Harness, precondition: Precondition) -> None:
        self._harness, self._precondition = harness, precondition
        device = harness.first.device
        self.state = {
            name: torch.full((), value, dtype=torch.float64, device=device)
            for name, value in SCALARS.items()
        }

    @property
    def rules(self) -> LevenbergMarquardt:
        """How λ and γ are adapted."""
        return LevenbergMarquardt(**self._harness.setting("adaptive"))

    def gamma(self, group: dict[str, Any]) -> Tensor:
        """γ, the damping of each factor, 0-d."""
        return self.state["gamma"] * (group["damping"] + group["weight_decay"]) ** 0.5

    def search(self, batch: Batch, live: Live) -> None:
        """Adapt γ if it is time: the best of three by the model of their rescaled steps."""
        rules, harness = self.rules, self._harness
        if harness.is_frozen or not self._comes(rules.gamma_period):
            return
        with harness.exact():
            parts = gather(harness, live)
            tried = [self._delta(parts, factor) for factor in trials(rules.gamma_omega)]
            previous = [part.previous for part in parts.all]
        model = self._model(batch, parts, [*tried, previous])
        values = []
        for i in range(len(tried)):
            plane = [i, len(tried)]
            slope = torch.stack([model.slope[j] for j in plane])
            Q = torch.stack([torch.stack([model.damped[j, k] for k in plane]) for j in plane])
            values.append(0.5 * slope @ best_in_plane(slope, Q, self._precision))
        factor = best_trial(self.state["gamma"], torch.stack(values), rules.gamma_omega)
        self.state["gamma"].copy_(factor)

    def move(self, batch: Batch, live: Live) -> None:
        """θ <- θ + lr (α Δ + μ δ), and λ by its outcome if it is time."""
        harness, rules = self._harness, self.rules
        with harness.exact():
            parts = gather(harness, live, count=True)
            delta = self._delta(parts, None)
            previous = [part.previous for part in parts.all]
        if not delta:
            return
        model = self._model(batch, parts, [delta, previous])
        with harness.exact():
            c = best_in_plane(model.slope, model.damped, self._precision)
            ok = torch.isfinite(c).all()
            c = torch.where(ok, c, 0.0)
            self.state["alpha"].copy_(c[0])
            self.state["mu"].copy_(c[1])
            for part, new, old in zip(parts.all, delta, previous, strict=True):
                move_(part, new, old, c, ok)
            self._count(live, ok)
        if not harness.is_frozen and self._comes(rules.period):
            self._judge(batch, model, harness.setting("lr") * c, rules)

    def _judge(self, batch: Batch, model: Quadratic, c: Tensor, rules: LevenbergMarquardt) -> None:
        """λ by ρ: the loss at the new parameters against the model's, both with the L2 term."""
        net = self._harness.model
        with parameters_at_rest(net):
            loss = run_again(self._harness, batch.closure, batch.start, cut_output)
        actual = (loss.double() - batch.loss.detach().double()).to(c.device) + model.l2_change(c)
        # a step left out has c = 0 in a model that may hold NaN
        self.state["rho"].copy_(reduction_ratio(actual, model.predicted(c)))
        factor = adapted(self.state["lambda"], self.state["rho"], rules.omega)
        self.state["lambda"].copy_(factor)

    def _comes(self, period: int) -> bool:
        return self._harness.step > 0 and self._harness.step % period == 0

    @property
    def _precision(self) -> torch.dtype:
        return factor_dtype(self._harness.first)

    def _delta(self, parts: Movings, factor: float | None) -> list[Tensor]:
        """Δ = -P ∇ for each part, in order; -∇ / γ² for a parameter without a block."""
        found = []
        for stack, blocks in parts.live.items():
            D = self._precondition(stack, parts.gradients[stack], factor).neg_()
            for block in blocks:
                found += [part for _, part in block.parts(D[stack.places[block]])]
        for part in parts.plain:
            gamma = self.gamma(part.group) * (1.0 if factor is None else factor)
            found.append(part.gradient / -(gamma**2))
        return found

    def _model(self, batch: Batch, parts: Movings, directions: list[list[Tensor]]) -> Quadratic:
        """The quadratic model along the directions, by one more evaluation of the closure."""
        every = parts.all
        parameters = [part.parameter for part in every]
        shaped = [
            [d.reshape(p.shape) for d, p in zip(v, parameters, strict=True)] for v in directions
        ]
        products = FisherProducts(self._harness.setting("likelihood"), parameters, shaped)
        loss = run_again(self._harness, batch.closure, batch.start, products)
        self._same(batch.loss, loss)
        with self._harness.exact():
            return self._quadratic(every, directions, products.result)

    def _same(self, first: Tensor, second: Tensor) -> None:
        """Raise ValueError if the closure changes its batch; looked at in the first step."""
        if self._harness.step == 0:
            a, b = float(first), float(second)
            if abs(a - b) > 1e-2 * max(abs(a), abs(b)):
                raise ValueError(OTHER_LOSS.format(a, b))

    def _quadratic(
        self, parts: list[Moving], directions: list[list[Tensor]], fisher: Tensor
    ) -> Quadratic:
        fisher = fisher.to(self.state["lambda"].device)
        k = len(directions)
        slope, pull = fisher.new_zeros(k), fisher.new_zeros(k)
        l2, damping = torch.zeros_like(fisher), torch.zeros_like(fisher)
        for i, part in enumerate(parts):
            rows = [part.gradient, *(v[i] for v in directions)]
            flat = torch.stack([row.reshape(-1) for row in rows])
            inner = (flat[1:] @ flat.T).to(fisher)
            slope += inner[:, 0]
            damping += part.group["damping"] * self.state["lambda"] * inner[:, 1:]
            if tau := part.group["weight_decay"]:
                l2 += tau * inner[:, 1:]
                pull += tau * (flat[1:] @ part.parameter.reshape(-1).to(flat)).to(fisher)
        return Quadratic(slope, pull, fisher, l2, damping)

    def _count(self, live: Live, ok: Tensor) -> None:
        """Count a step that was skipped because the model was not finite, for every layer."""
        if not known_true(ok):
            for stack, blocks in live.items():
                self._harness.count(stack, {"not finite": ~ok & stack.mask(blocks)})
