"""Hessian-free optimization with Martens' rules for damping, stopping and step length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...blocks.partitions import Blocks
from ...capture.closures import RandomState
from ...core import distributed
from ...core.levenberg_marquardt import adapted, reduction_ratio
from ...core.momentum import coupled
from .conjugate_gradients import System, solve
from .gauss_newton import GaussNewton
from .hessian_free import HessianFree, Step
from .jacobians import Piece
from .objective import Objective
from .squared_gradients import mean_squares

TOLERANCE, LEAST, SHARE = 5e-4, 10, 0.1  # of the stopping rule
SPACING = 1.3  # of the iterates kept for backtracking
SLOPE, SHRINK, TRIES = 1e-2, 0.8, 60  # of the line search
OMEGA = 2 / 3  # of the damping
POWER = 0.75  # of the preconditioner


class MartensHessianFree(HessianFree):
    """Hessian-free as published in 2010: `HessianFree` with five rules of its own.

    1. CG is preconditioned by (mean_n ∇ℓ_n ∘ ∇ℓ_n + λ)^(3/4) over the curvature batch.
    2. CG stops at iteration i > k when φ_i < 0 and (φ_i - φ_{i-k}) / φ_i < 5e-4 k, with
       k = max(10, 0.1 i), φ(d) = ½ dᵀ(G_bb + λI)d + ∇_bᵀd.
    3. Backtracking: from the last CG iterate to earlier ones, spaced by a factor of 1.3, while the
       loss there is lower.
    4. Damping: λ <- 2/3 λ if ρ > 3/4, 3/2 λ if ρ < 1/4, ρ the change of loss and L2 term over
       that of φ without λ. `factor` is the product of these changes so far.
    5. Line search (Armijo): lr d times 1, 0.8, 0.8², ... until the loss falls by 1e-2 of the
       slope; after 60 tries nothing moves, counted as "line search failed".

    Rules 3 to 5 evaluate the closure's batch again and wait for a GPU. One process only. Settings
    as in HessianFree; `damping` is where λ starts.

    Raises: as HessianFree; RuntimeError for a layer that torch.func.vmap cannot batch.
    Source: Martens 2010, section 4; the constants as we recall them.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 1.0,
        damping: float = 1.0,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        curvature_batch: int | None = None,
        max_cg: int = 250,
        *,
        blocks: Blocks = None,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(
            model, lr, damping, momentum, weight_decay, likelihood, curvature_batch, max_cg,
            blocks=blocks, decoupled_weight_decay=decoupled_weight_decay, groups=groups,
        )  # fmt: skip
        self.factor = torch.ones((), dtype=torch.float64, device=self._failures.device)

    def state_dict(self) -> dict[str, Any]:
        """State of HessianFree, with `factor`."""
        return {**super().state_dict(), "factor": self.factor.clone()}

    def _take_factor(self, factor: Tensor | None) -> None:
        if factor is None:
            raise ValueError(
                "the state_dict has no damping factor: it is HessianFree's, load it there"
            )
        self.factor.copy_(factor)

    def _damping(self, group: dict[str, Any]) -> Any:
        return group["damping"] * self.factor

    def _iterate(
        self, systems: list[System], G: GaussNewton, pieces: list[Piece], batch: int
    ) -> None:
        distributed.alone("MartensHessianFree", "use HessianFree")
        squares = mean_squares(pieces, [system.parameters for system in systems], batch)
        for system, own in zip(systems, squares, strict=True):
            damped = zip(own, system.damping, strict=True)
            D = torch.cat([(s.to(system.g.dtype) + damping).reshape(-1) for s, damping in damped])
            system.D = D.pow_(POWER)
        limit = self._setting("max_cg")
        solve(systems, G.products, limit, progress_is_slow, kept_iterations(limit))

    def _chosen(
        self, systems: list[System], closure: Callable[[], Tensor], start: RandomState, loss: Tensor
    ) -> Step:
        if any(bool(system.failed) for system in systems):
            return super()._chosen(systems, closure, start, loss)  # the step will be skipped
        parameters = [p for system in systems for p in system.parameters]
        groups = [self._group_of[p] for p in parameters]
        taus = [coupled(group) for group in groups]
        objective = Objective(self._model, closure, start, loss, parameters, taus)
        x, phi, value = backtracked(systems, objective)
        d = step_of(systems, x)
        damped = [g["damping"] * p.square().sum() for g, p in zip(groups, d, strict=True)]
        rho = reduction_ratio(value - objective.here, phi - 0.5 * self.factor * sum_of(damped))
        self.factor.copy_(adapted(self.factor, rho, OMEGA))
        rates = [group["lr"] for group in groups]
        known = value if all(rate == 1 for rate in rates) else None
        step = [part * rate for part, rate in zip(d, rates, strict=True)]
        gradients = step_of(systems, [system.g for system in systems])
        slope = sum_of([(g * s).sum() for g, s in zip(gradients, step, strict=True)])
        return x, accepted_share(step, slope, objective, known)


def progress_is_slow(phi: Sequence[Tensor]) -> Tensor:
    """Whether CG stops after these values of φ, the start's first; 0-d bool."""
    i = len(phi) - 1
    k = max(LEAST, int(SHARE * i))
    if i <= k:
        return torch.zeros_like(phi[-1], dtype=torch.bool)
    now, then = phi[-1], phi[-1 - k]
    return (now < 0) & ((now - then) / now < k * TOLERANCE)


def kept_iterations(limit: int) -> list[int]:
    """CG iterations whose iterates backtracking may take, in ascending order.

    >>> kept_iterations(12)
    [1, 2, 3, 4, 5, 6, 8, 11]
    """
    found, place = [], 1.0
    while round(place) <= limit:
        found.append(round(place))
        place *= SPACING
    return sorted(set(found))


def backtracked(
    systems: Sequence[System], objective: Objective
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Solutions of all systems, φ summed over them, and the loss there.

    The last iterates, or the first before them whose predecessors have no lower loss.
    """
    x, phi = [s.x for s in systems], sum_of([s.phi[-1] for s in systems])
    value = objective.at(step_of(systems, x))
    for kept in reversed(list(zip(*(s.iterates for s in systems), strict=True))):
        earlier = [one for one, _ in kept]
        if all(torch.equal(a, b) for a, b in zip(earlier, x, strict=True)):
            continue  # conjugate gradients had ended by then
        found = objective.at(step_of(systems, earlier))
        if torch.isfinite(value) and not found < value:
            break
        x, phi, value = earlier, sum_of([one for _, one in kept]), found
    return x, phi, value


def accepted_share(
    step: Sequence[Tensor], slope: Tensor, objective: Objective, value: Tensor | None
) -> float:
    """Largest share 0.8^i of a step that lowers the loss enough, or 0 after `TRIES`.

    slope: ∇ᵀ step. value: the loss at the whole step, if known.
    """
    share = 1.0
    for _ in range(TRIES):
        if value is None:
            value = objective.at([share * part for part in step])
        if bool(value <= objective.here + SLOPE * share * slope):
            return share
        share, value = share * SHRINK, None
    return 0.0


def step_of(systems: Sequence[System], vectors: Sequence[Tensor]) -> list[Tensor]:
    """One tensor per parameter from one vector [d] per system."""
    return [part for s, v in zip(systems, vectors, strict=True) for part in s.split(v)]


def sum_of(scalars: Sequence[Tensor]) -> Tensor:
    """Sum, 0-d float64."""
    return torch.stack([scalar.double() for scalar in scalars]).sum()
