"""KBFGSLimited: K-BFGS whose steps are shortened where the loss curves more than planned. Ours."""

from typing import Any, ClassVar

from torch import Tensor, nn

from ...core import settings as checks
from ...core.base import Closure, CurvatureOptimizer, Live
from . import step_limit
from .kbfgs import KBFGS


class KBFGSLimited(KBFGS):
    """K-BFGS with a limit on the curvature that a step d = -lr P M meets.

    d meets the curvature κ = 2 (ℓ(θ + d) - ℓ(θ) - ∇·d) / ⟨M, -d⟩ times the planned one; d and M
    are multiplied by min(1, curvature_limit / κ) after H_g has learned from all of d
    (`kbfgs.step_limit` says why). At steps that update, with the closure's loss as it returns it.
    Decoupled weight decay comes after the second evaluation. The attribute `curvature_ratio` is κ
    of the last step, a tensor; None of one that updated nothing.

    curvature_limit: > 0; the default is the greatest of those tried with which no seed diverged
        (docs/stability.md); infinity only measures κ. The others are those of `KBFGS`.

        >>> KBFGSLimited(nn.Linear(3, 2)).param_groups[0]["curvature_limit"]
        5.0
    """

    _former: ClassVar[dict[str, tuple[Any, str]]] = {
        "damping_split": KBFGS._former["damping_split"]
    }

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 0.3,
        momentum: float = 0.9,
        decay: float = 0.9,
        weight_decay: float = 0.0,
        history: int | None = None,
        update_every: int = 1,
        *,
        pair_decay: float | None = None,
        curvature_limit: float = 5.0,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        CurvatureOptimizer.__init__(self, model, groups, locals())

    def _check(self, settings: dict[str, Any]) -> None:
        super()._check(settings)
        checks.limit("curvature_limit", settings["curvature_limit"])

    def _prepare(self) -> None:
        super()._prepare()
        self.curvature_ratio: Tensor | None = None
        self._taken: step_limit.Taken | None = None
        self._decay: dict[Tensor, Tensor] = {}

    def _iterate(self, closure: Closure | None) -> Tensor:
        self.curvature_ratio = None
        return super()._iterate(closure)

    def _move(self, live: Live, learned: Any) -> None:
        groups = self._harness.groups
        before = step_limit.remember(groups) if learned else {}
        super()._move(live, learned)
        self._decay = step_limit.undecayed_(before, groups)
        self._taken = step_limit.taken(before, live, self.state) if before else None

    def _judge(self, live: Live, loss: Tensor, after: Tensor) -> None:
        if self._taken is not None:
            self._shorten(self._taken, loss, after, live)
        for p, own in self._decay.items():
            p.sub_(own)
        self._taken, self._decay = None, {}

    def _shorten(self, taken: step_limit.Taken, loss: Tensor, after: Tensor, live: Live) -> None:
        kept = self._kept(taken, loss.detach(), after.detach())
        step_limit.shorten_(taken, kept)
        for stack, blocks in live.items():
            self._harness.count(stack, {"step shortened": (kept < 1) & stack.mask(blocks)})

    def _kept(self, taken: step_limit.Taken, loss: Tensor, after: Tensor) -> Tensor:
        """The share of the step that stays, from the loss at both of its ends."""
        self.curvature_ratio = step_limit.ratio(taken, loss, after)
        return step_limit.kept(self.curvature_ratio, self._harness.setting("curvature_limit"))
