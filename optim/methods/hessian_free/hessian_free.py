"""Hessian-free optimization: Gauss-Newton steps by conjugate gradients, whole or by blocks."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ...blocks.partitions import Blocks, Part, partition
from ...capture.closures import RandomState, full_precision, random_state, replayed, run, untouched
from ...capture.likelihoods import FISHER
from ...core import distributed
from ...core import settings as checks
from ...core.checkpoint import exact_state
from ...core.errors import NumericalError
from ...core.grad_scaler import refuse_scaler
from ...core.momentum import coupled, decoupled, gradient_of
from ...core.refresher import PATIENCE, to_host
from ...core.summary import table
from ...linalg.basics import factor_dtype, free_to_read, is_finite, known_true
from .conjugate_gradients import System, solve
from .curvature_batch import ModelCalls, recorded, subset
from .gauss_newton import GaussNewton
from .jacobians import Route

COUNTS = (
    "steps",
    "iterations",
    "skipped",
    "not finite",
    "no curvature",
    "no descent",
    "line search failed",
)
REMEDY = "raise the damping or max_cg, lower lr, or look for inputs that are not finite"
NOT_SETTINGS = ("self", "__class__", "model", "blocks", "groups")
FORMER = ("stop", "preconditioner", "backtracking", "line_search", "adaptive")
Step = tuple[list[Tensor], float]  # solutions x of all systems, and the share of them to take


class HessianFree(Optimizer):
    """Truncated Newton step on the Gauss-Newton matrix G: θ <- θ + lr d, (G_bb + λI) d_b ≈ -∇_b.

    For each block b of parameters, conjugate gradients (CG) on ½ dᵀ(G_bb + λI)d + ∇_bᵀd start at
    `momentum` times the last d_b and take at most `max_cg` iterations. ∇ is the mean over the
    closure's batch, G over part of its examples. blocks=None is plain Hessian-free, one block of
    all parameters. Several blocks are solved independently, without the parts of G between them.

    Needs step(closure). If a gradient, a product or a solution is not finite, or a solution raises
    its quadratic model, the step is skipped and counted; that block's next start is zero.

    model: returns a tensor; dimension 0 of its arguments and of its output is the batch.
    lr: step size, >= 0.  damping: λ > 0.
    momentum: share of the last solution at which CG starts, in [0, 1); not a velocity.
    weight_decay: τ of an L2 term, in ∇ and on the diagonal of G; with
        decoupled_weight_decay=True θ shrinks by lr * weight_decay instead.
    likelihood: the loss is its negative logarithm: "categorical" (classes in dimension 1),
        "bernoulli" (logits) or "gaussian" (½ ‖output - label‖²), summed over outputs, averaged
        over examples.
    curvature_batch: number of examples in G, drawn anew at each step from the optimizer's own
        generator (seeded from torch.initial_seed()); None is a quarter of the batch.
    max_cg: CG iterations per step.
    blocks: module names of each block, [["encoder"], ["decoder"]]; a name stands for everything
        inside the module, and a layer in no block is one by itself. Or a function from the model
        to such a list.
    groups: as torch's parameter groups, for other lr, damping, momentum, weight_decay.

    State of each parameter: "solution", its part of the last d; "counts" at the first one of each
    block, in the order of `COUNTS`. Vectors are float32, or float64 for float64 parameters. The
    number of steps is param_groups[0]["step"].

    Raises: ValueError for a bad setting, a batch smaller than the curvature batch, or a model that
    cannot be differentiated for it; NumericalError after three skipped steps in a row.
    Source: Martens 2010, Deep learning via Hessian-free optimization (plain); Zhang, Xiong,
    Bradbury, Socher 2017, arXiv:1712.07296 (by blocks). Defaults are ours, theirs are not known.
    """

    __reduce_ex__ = checks.no_copy

    _step_supports_amp_scaling = True

    def __new__(cls, *_args: Any, **settings: Any) -> Self:
        """Refuse options of earlier versions. Raises: TypeError with what to use instead."""
        for name in settings.keys() & set(FORMER):
            raise TypeError(
                f"{cls.__name__} takes no {name}=; MartensHessianFree has Martens' rules built in"
            )
        return super().__new__(cls)

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.3,
        damping: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        likelihood: str = "bernoulli",
        curvature_batch: int | None = None,
        max_cg: int = 30,
        *,
        blocks: Blocks = None,
        decoupled_weight_decay: bool = False,
        groups: list[dict[str, Any]] | None = None,
    ) -> None:
        settings = {k: v for k, v in locals().items() if k not in NOT_SETTINGS}
        checks.common(settings)
        checks.choice("likelihood", likelihood, FISHER)
        checks.at_least_one("max_cg", max_cg)
        if curvature_batch is not None:
            checks.at_least_one("curvature_batch", curvature_batch)
        super().__init__(checks.grouped(model, groups, settings), {**settings, "step": 0})
        # the module inside DistributedDataParallel: products are joined here, not by its reducer
        self._model: nn.Module = (
            model.get_submodule("module") if hasattr(model, "no_sync") else model
        )
        self._blocks = blocks
        self.route: Route | None = None
        self.rows: Tensor | None = None
        self.parts = self._partition()
        self._generator = torch.Generator().manual_seed(torch.initial_seed() + distributed.rank())
        device = self.parts[0].parameters[0].device
        self._failures = torch.zeros((), dtype=torch.int64, device=device)
        self._verdict: tuple[Tensor, torch.cuda.Event | None] | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One iteration; returns the loss before it.

        Raises: TypeError without a closure; ValueError under a GradScaler, for a model that the
        closure does not call, and for a batch smaller than the curvature batch; NumericalError
        after three skipped steps in a row.
        """
        refuse_scaler(self)
        closure = checks.needed(closure, "HessianFree")
        self._heed()
        start = random_state(self._model)
        with recorded(self._model) as calls:
            loss = run(closure)
        self.rows = subset(calls.examples, self._setting("curvature_batch"), self._generator)
        with full_precision(self._failures.device):
            systems = self._systems()
            if systems:
                solved = self._solve(systems, calls, start)
                self._move(systems, self._chosen(systems, closure, start, loss) if solved else None)
        calls.clear()
        for group in self.param_groups:
            group["step"] += 1
        self._heed()
        return loss

    def directions(self) -> dict[str, dict[str, Tensor]]:
        """{block: {parameter: its part of the last d}}. Raises: RuntimeError before a step."""
        names: dict[Tensor, str] = {p: n for n, p in self._model.named_parameters()}
        found = {
            part.name: {
                names[p]: self.state[p]["solution"]
                for p in part.parameters
                if "solution" in self.state.get(p, {})
            }
            for part in self.parts
        }
        if not any(found.values()):
            raise RuntimeError("no direction yet: take a step first")
        return found

    def summary(self) -> str:
        """Table of each parameter, its block, the memory of its state, the block's counters."""
        lines = table(self, self._model, self.parts, COUNTS)
        if self.route is None:
            return f"{lines}\ncurvature products: chosen at the first step"
        return f"{lines}\ncurvature products by {self.route.route}"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in PyTorch. Raises: ValueError, and nothing is added, for a bad group."""
        super().add_param_group(param_group)
        if hasattr(self, "parts"):
            checks.joined(self.param_groups, self.defaults, self._model)
            try:
                self.parts = self._partition()
            except ValueError:
                self.param_groups.pop()
                raise

    def state_dict(self) -> dict[str, Any]:
        """State as in PyTorch, with the generator of rows and the failures in a row."""
        own = {"rows": self._generator.get_state(), "failures": self._failures.clone()}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit. Raises: ValueError for an adaptive damping."""
        self._take_factor(state_dict.get("factor"))
        super().load_state_dict(state_dict)
        exact_state(self, state_dict)
        self._generator.set_state(state_dict["rows"].cpu())
        self._failures.copy_(state_dict["failures"])
        self._verdict = None
        self.parts = self._partition()  # torch has made new groups

    def _take_factor(self, factor: Tensor | None) -> None:
        """Accept no damping factor but one, which versions with options saved too."""
        if factor is not None and float(factor) != 1.0:
            raise ValueError(
                f"the state_dict holds an adaptive damping (factor {float(factor):.3g}), which "
                "HessianFree does not have; load it into MartensHessianFree"
            )

    def _partition(self) -> list[Part]:
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        mine = [p for p in self._model.parameters() if p in group_of]
        if strangers := len(group_of) - len(mine):
            name = type(self._model).__name__
            raise ValueError(f"{strangers} parameters of the groups are not in {name}")
        parts = partition(self._model, mine, self._blocks)
        self._group_of = group_of
        return parts

    def _setting(self, name: str) -> Any:
        """A setting that all groups share: the first group's."""
        return self.param_groups[0][name]

    def _systems(self) -> list[System]:
        """One linear system for each block that has gradients now."""
        own = [[p for p in part.parameters if p.grad is not None] for part in self.parts]
        return [self._system(parameters) for parameters in own if parameters]

    def _system(self, parameters: list[Tensor]) -> System:
        gradients, starts, dampings, warm = [], [], [], False
        for p in parameters:
            group, state, dtype = self._group_of[p], self.state[p], factor_dtype(p)
            tau = coupled(group)
            gradients.append((gradient_of(p).to(dtype) + tau * p.to(dtype)).reshape(-1))
            dampings.append(self._damping(group) + tau)
            warm = warm or ("solution" in state and group["momentum"] > 0)
            held = state.setdefault("solution", torch.zeros_like(p, dtype=dtype))
            starts.append((group["momentum"] * held).reshape(-1))
        return System(parameters, torch.cat(gradients), dampings, torch.cat(starts), warm)

    def _damping(self, group: dict[str, Any]) -> Any:
        """λ of a group's parameters, a number or 0-d tensor."""
        return group["damping"]

    def _solve(self, systems: list[System], calls: ModelCalls, start: RandomState) -> bool:
        """Run conjugate gradients on all blocks; False if a gradient is known not to be finite."""
        # the first step reads values on any device: a route cannot be tried on NaN
        readable = self.route is None or free_to_read(self._failures)
        if readable and any(bool(system.lost) for system in systems):
            return False
        pieces = calls.pieces(self.rows)
        with (
            untouched(self._model),
            replayed(self._model, start),
            sdpa_kernel(SDPBackend.MATH),  # the fused ones have no second derivative
        ):
            parts = [system.parameters for system in systems]
            G = GaussNewton(pieces, parts, self._setting("likelihood"), self.route)
            self.route = G.route
            self._iterate(systems, G, pieces, calls.examples)
        return True

    def _iterate(self, systems: list[System], G: GaussNewton, *_: Any, **__: Any) -> None:
        """Conjugate gradients; *_: pieces of the curvature batch, examples in the whole batch."""
        solve(systems, G.products, self._setting("max_cg"))

    def _chosen(self, systems: list[System], *_: Any, **__: Any) -> Step:
        """The last iterates, whole; *_: closure, state of the generators before it, its loss."""
        return [system.x for system in systems], 1.0

    def _move(self, systems: list[System], found: Step | None) -> None:
        """θ <- θ + share lr d, and keep the solutions, unless any block failed."""
        ok = ~torch.stack([system.failed for system in systems]).any()
        stays = found is not None and found[1] == 0.0  # no share of the step lowers the loss
        if found is not None and not stays:
            for system, x in zip(systems, found[0], strict=True):
                for p, d in zip(system.parameters, system.split(x), strict=True):
                    _move_(p, d, found[1], self._group_of[p], ok)
        for system in systems:
            again = system.uphill | (system.lost & is_finite(system.g.sum()))
            for p, x in zip(system.parameters, system.split(system.x), strict=True):
                held = self.state[p]["solution"]
                held.copy_(torch.where(ok, x, torch.where(again, torch.zeros_like(held), held)))
            self._count(system, ok, stays)
        self._failures.copy_(torch.where(ok, 0, self._failures + 1))
        stop = self._failures >= PATIENCE
        self._verdict = (stop, None) if free_to_read(stop) else to_host(stop)

    def _count(self, system: System, ok: Tensor, stays: bool) -> None:
        state = self.state[system.parameters[0]]
        zeros = torch.zeros(len(COUNTS), dtype=torch.int64, device=ok.device)
        happened = [ok, system.iterations, ~ok, system.lost, system.flat, system.uphill]
        happened.append(torch.full_like(ok, stays))
        state.setdefault("counts", zeros).add_(torch.stack([x.long() for x in happened]))

    def _heed(self) -> None:
        """Raise NumericalError if three steps in a row are known to have been skipped."""
        if self._verdict is None or (self._verdict[1] is not None and not self._verdict[1].query()):
            return
        stop, self._verdict = bool(self._verdict[0]), None
        if stop:
            raise NumericalError(
                f"{int(self._failures)} steps in a row were skipped (counters of each block: "
                f"summary()): {REMEDY}"
            )


def _move_(p: Tensor, d: Tensor, share: float, group: dict[str, Any], ok: Tensor) -> None:
    """θ <- (1 - lr τ) θ + share lr d where ok; the first only with decoupled weight decay."""
    if shrink := decoupled(group):
        p.mul_(1 - shrink * ok.to(p.dtype))
    step = d if known_true(ok) else torch.where(ok, d, torch.zeros_like(d))
    p.add_(step.to(p.dtype), alpha=share * group["lr"])
