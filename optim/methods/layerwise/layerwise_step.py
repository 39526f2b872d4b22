"""LayerwiseStep: a measured step size for every layer, in place of the learning rate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from ...blocks.blocks import Layer, layers_of
from ...capture.closures import random_state, replayed, run, untouched
from ...core import distributed, settings
from ...core.checkpoint import exact_state
from ...core.grad_scaler import refuse_scaler
from ...core.summary import aligned, memory, readable
from ...linalg.basics import all_finite, factor_dtype
from .hessian_products import Directions, ProductsOfBackward

SETTINGS = "decay", "max_step", "max_move", "layers_per_step"
COUNTS = ("measured", "no descent", "product not finite", "step not finite", "cut")
EPS = 1e-30  # of the curvature dᵀHd in loss units; max_step is what bounds a flat direction

NO_BACKWARD = """the closure gave no gradient by loss.backward(), which LayerwiseStep needs:

    def closure():
        opt.zero_grad()
        loss = criterion(model(x), t)
        loss.backward()
        return loss

torch.autograd.backward(loss) does not count; in the second run .grad is None after backward"""


def learn_(state: dict[str, Tensor], pair: Tensor, decay: float, max_step: float) -> None:
    """Average ⟨g, d⟩ and |dᵀHd|, then α = min(⟨g, d⟩ / max(|dᵀHd|, eps), max_step).

    A pair that is not finite, or no descent, is only counted.
    """
    finite = torch.isfinite(pair).all()
    descent = pair[0] > 0
    ok = finite & descent
    weight = (ok * (1 - decay)).to(pair.dtype)
    for key, value in zip(("slope", "curvature"), pair.abs().nan_to_num(0, 0, 0), strict=True):
        state[key].lerp_(value, weight)
    state["counts"][:3] += torch.stack([ok, finite & ~descent, ~finite])
    # both averages start from zero and lack the same factor, which matters to eps only
    unbiased = 1 - decay ** state["counts"][0]
    alpha = state["slope"] / state["curvature"].clamp(min=EPS * unbiased)
    state["alpha"].copy_(torch.where(ok, alpha.clamp(max=max_step), state["alpha"]))


def largest_step(theta: list[Tensor], d: list[Tensor], max_move: float) -> Tensor:
    """Largest step size max_move ‖θ_l‖ / ‖d_l‖, 0-d; infinite for θ_l = 0."""
    size, step = (torch.stack([one.norm() for one in part]).norm() for part in (theta, d))
    return torch.where(size > 0, max_move * size / step, torch.inf)


class LayerwiseStep(Optimizer):
    """Any optimizer with a measured step size per layer: θ_l <- θ_l - α_l d_l.

    α_l = ⟨∇_l, d_l⟩ / max(|d_lᵀ H_ll d_l|, eps), clipped to [0, max_step]: the minimum along d_l
    of the layer's quadratic model. d is the step of the wrapped optimizer at lr = 1, with its own
    momentum, weight decay and preconditioner; its lr is never used. H_ll is the Hessian block of
    the layer's parameters, exact, by double backward.

    A layer is a module that owns parameters directly, weight and bias together. Each is measured
    in its first step with a gradient, then `layers_per_step` of them in turn. Measurements, without
    weight decay, enter running averages of ⟨∇_l, d_l⟩ and |d_lᵀ H_ll d_l|, whose ratio is α_l until
    the next. Counted are: one that is no descent or not finite, where the last α_l stays (0 at
    first); a gradient that is not finite, where the layer stays and the wrapped optimizer sees
    zero; and ‖α_l d_l‖ cut to max_move ‖θ_l‖ (unless θ_l = 0), where there are several layers,
    since they move at once and α_l may be some steps old.

    Each step evaluates the closure twice on one batch, with the same dropout masks. In the second
    pass loss.backward() stands for the products and .grad is None; buffers, .grad and statistics
    end as the first pass left them. Losses must be twice differentiable, and backward a method of
    the loss. One process only.

    optimizer: any torch.optim.Optimizer over parameters of `model`; param_groups are shared.
    decay: of the averages, in [0, 1).
    max_step: upper bound of α, > 0; 1 is the natural one around a second-order optimizer.
    max_move: largest move of a layer among others, over the norm of its parameters, > 0.

    State of each layer, at its first parameter: alpha, slope, curvature (0-d) and counts, in the
    order of `COUNTS`. The wrapped optimizer is `.optimizer`.

    Raises: TypeError or ValueError for a bad setting or a closure without loss.backward().
    Source: Bahamou, Goldfarb 2023, arXiv:2305.13664, as far as its abstract goes; averages, turns,
    bounds and the treatment of bad measurements are ours.

    On a quadratic one step finds the minimum along the gradient, whatever lr:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> opt = LayerwiseStep(torch.optim.SGD(model.parameters(), lr=123.0), model)
        >>> def closure():
        ...     opt.zero_grad()
        ...     loss = 2 * model.weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> opt.step(closure).item(), model.weight.tolist(), opt.step_sizes()[""].item()
        (4.0, [[0.0, 0.0]], 0.25)
    """

    __reduce_ex__ = settings.no_copy

    _step_supports_amp_scaling = True  # to see a GradScaler, and refuse it

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        *,
        decay: float = 0.9,
        max_step: float = 10.0,
        max_move: float = 0.1,
        layers_per_step: int = 1,
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"the first argument is the optimizer to wrap, got {type(optimizer).__name__}"
            )
        if not all("lr" in group for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} has no 'lr' in its param_groups")
        settings.trainable(model)
        settings.fraction("decay", decay)
        settings.positive("max_step", max_step)
        settings.positive("max_move", max_move)
        settings.at_least_one("layers_per_step", layers_per_step)
        super().__init__([{"params": g["params"]} for g in optimizer.param_groups], {})
        self.optimizer, self.decay, self.max_step = optimizer, decay, max_step
        self.max_move, self.layers_per_step = max_move, layers_per_step
        self._model = model
        self._turn = 0
        self._share()
        layers_of(model, self._parameters())

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor:  # type: ignore[override]
        """One iteration; returns the loss before it.

        Raises: TypeError without a closure; ValueError if the closure calls no loss.backward(),
            and under a GradScaler.
        """
        refuse_scaler(self)
        closure = settings.needed(closure, "LayerwiseStep")
        distributed.alone("LayerwiseStep", "train in one process")
        self._share()
        start = random_state(self._model)
        finite: dict[Tensor, Tensor] = {}
        before = {p: p.clone() for p in self._parameters()}
        with self._unit_rate():
            wrapped: Any = self.optimizer.step  # annotated as returning a float
            loss = wrapped(lambda: self._guarded(closure, finite))
        if not finite:
            raise ValueError(NO_BACKWARD)
        directions = {p: _take_back_(p, before.pop(p)) for p in finite}
        layers = layers_of(self._model, self._parameters())
        live = [x for x in layers if any(p in finite for p in x.parameters)]
        due = self._due(layers, live)
        for layer, pair in zip(due, self._measure(closure, start, due, directions), strict=True):
            learn_(self._state(layer), pair, self.decay, self.max_step)
        for layer in live:
            self._move(layer, directions, finite, alone=len(live) == 1)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear gradients, and what the wrapped optimizer clears with them."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer, which owns the groups."""
        if "optimizer" not in self.__dict__:  # torch's constructor is filling its own list
            super().add_param_group(param_group)
            return
        self.optimizer.add_param_group(param_group)
        self._share()

    def step_sizes(self) -> dict[str, Tensor]:
        """Step sizes {module name: α, 0-d} of the layers that had a gradient so far, live views."""
        layers = layers_of(self._model, self._parameters())
        return {x.name: self._state(x)["alpha"] for x in layers if x.parameters[0] in self.state}

    def summary(self) -> str:
        """Table of each layer, its parameters, α, memory and nonzero counters, with totals."""
        rows = [("layer", "parameters", "step size", "memory", "counters")]
        for layer in layers_of(self._model, self._parameters()):
            state = self.state.get(layer.parameters[0])
            counts = state["counts"].tolist() if state else [0] * len(COUNTS)
            rows.append(
                (
                    layer.name or f"({type(self._model).__name__} itself)",
                    str(sum(p.numel() for p in layer.parameters)),
                    f"{state['alpha'].item():.3g}" if state else "not measured",
                    readable(memory(state or {})),
                    ", ".join(f"{name} {n}" for name, n in zip(COUNTS, counts, strict=True) if n),
                )
            )
        name = type(self.optimizer).__name__
        own, theirs = (sum(map(memory, o.state.values())) for o in (self, self.optimizer))
        total = f"total memory of the state: {readable(own)}, of {name}'s {readable(theirs)}"
        return "\n".join([f"LayerwiseStep of {name}", *aligned(rows), total])

    def state_dict(self) -> dict[str, Any]:
        """State as in PyTorch, with the "wrapped" optimizer, settings and whose turn is next."""
        return {
            **super().state_dict(),
            "wrapped": self.optimizer.state_dict(),
            "settings": {name: getattr(self, name) for name in SETTINGS},
            "turn": self._turn,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume from `state_dict()` bit for bit, the wrapped optimizer included."""
        super().load_state_dict(state_dict)
        exact_state(self, state_dict)
        self.optimizer.load_state_dict(state_dict["wrapped"])
        self._turn = state_dict["turn"]
        for name, value in state_dict["settings"].items():
            setattr(self, name, value)
        self._share()

    def _share(self) -> None:
        """Hold the wrapped optimizer's groups; loading a state gives it new ones."""
        self.param_groups = self.optimizer.param_groups

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    @contextmanager
    def _unit_rate(self) -> Iterator[None]:
        """Inside, lr = 1 in every group, so that a step is minus the direction."""
        groups = list(self.param_groups)
        rates = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = 1.0
        try:
            yield
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    def _guarded(self, closure: Callable[[], Tensor], finite: dict[Tensor, Tensor]) -> Tensor:
        """The closure; then gradients that are not finite are zero, and `finite` says which."""
        loss = run(closure)
        for p in self._parameters():
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError("sparse gradients are not supported; use sparse=False")
            ok = all_finite(p.grad)
            p.grad.nan_to_num_(0.0, 0.0, 0.0).mul_(ok)
            finite[p] = finite[p] & ok if p in finite else ok
        return loss

    def _due(self, layers: list[Layer], live: list[Layer]) -> list[Layer]:
        """Layers never measured, or else the next in turn."""
        if fresh := [x for x in live if x.parameters[0] not in self.state]:
            return fresh
        order = layers[self._turn :] + layers[: self._turn]
        due = [x for x in order if x in live][: self.layers_per_step]
        self._turn = (layers.index(due[-1]) + 1) % len(layers)
        return due

    def _measure(
        self, closure: Callable[[], Tensor], start: Any, due: list[Layer], directions: Directions
    ) -> list[Tensor]:
        """[⟨g, d⟩, dᵀ H_ll d] of each layer, from a second run of the closure at the same θ."""
        frozen = getattr(self.optimizer, "frozen", nullcontext)  # ours gather statistics in hooks
        recorder = ProductsOfBackward(due, directions)
        with (
            frozen(),
            untouched(self._model),
            replayed(self._model, start),
            sdpa_kernel(SDPBackend.MATH),  # the fused ones have no second derivative
            recorder,
        ):
            run(closure)
        if not recorder.pairs:
            raise ValueError(NO_BACKWARD)
        return recorder.pairs

    def _state(self, layer: Layer) -> dict[str, Tensor]:
        first = layer.parameters[0]
        state = self.state[first]
        if not state:
            for key in ("alpha", "slope", "curvature"):
                state[key] = torch.zeros((), dtype=factor_dtype(first), device=first.device)
            state["counts"] = torch.zeros(len(COUNTS), dtype=torch.int64, device=first.device)
        return state

    def _move(
        self, layer: Layer, directions: Directions, finite: dict[Tensor, Tensor], *, alone: bool
    ) -> None:
        """θ_l <- θ_l - α_l d_l or a part of it, if the gradient and d are finite; spoils d."""
        state, own = self._state(layer), [p for p in layer.parameters if p in directions]
        d = [directions[p] for p in own]
        ok = torch.stack([finite[p] & all_finite(one) for p, one in zip(own, d, strict=True)]).all()
        for one in d:
            one.nan_to_num_(0.0, 0.0, 0.0)
        step = state["alpha"] * ok
        if not alone:
            most = largest_step(own, d, self.max_move)
            state["counts"][4] += step > most
            step = torch.minimum(step, most)
        state["counts"][3] += ~ok
        for p, one in zip(own, d, strict=True):
            p.sub_(one.mul_(step))


def _take_back_(parameter: Tensor, before: Tensor) -> Tensor:
    """Undo a step; returns d = before - after, float32 or better."""
    dtype = factor_dtype(parameter)
    d = before.to(dtype) - parameter.to(dtype)
    parameter.copy_(before)
    return d
