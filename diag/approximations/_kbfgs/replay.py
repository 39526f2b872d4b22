"""K-BFGS replayed at fixed parameters: the state its updates build from a problem's own data.

Every step draws a minibatch, takes K-BFGS's direction p = -H_g M H_a in all layers at once,
evaluates the minibatch again at θ + lr p, and updates each layer's H_g and H_a. Then the parameters
are θ again, so that one pass over the data at θ serves all steps.

Written from the papers without `optim`, to be compared with it: arXiv:2006.08877 for Linear layers
with one row per example; arXiv:2102.06737 for layers that use their weights at many positions t.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...backward.layers import layers
from ...problem import Block, Member, Problem
from .formulas import damp_always, damp_twice, updated
from .passes import Change, LayerPass, seen_layers, trial

DECAY = 0.9  # of the averages M, A, s and y
CHUNK_BYTES = 2**28  # memory for the patches unfolded at once when A is summed over all examples
COUNTS = (
    "pairs accepted",
    "pairs skipped",
    "pairs not finite",
    "first damping fired",
    "second damping fired",
    "actions accepted",
    "actions skipped",
)


@dataclass(frozen=True)
class Replay:
    """Settings of a replay of K-BFGS.

    damping: λ > 0; λ_A = μ_2 = √λ. steps: minibatches, each with one update of H_g and of H_a.
    batch: examples per minibatch, None for a quarter of them. lr: the trial point is θ + lr p; a
    small lr brings (s, y) closer to the curvature at θ, and changes no damping. seed: of the
    minibatches.

    Raises: ValueError for a damping, lr, batch or number of steps that is not positive.
    """

    damping: float = 0.3
    steps: int = 50
    batch: int | None = None
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("damping", "steps", "batch", "lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"a replay of K-BFGS needs {name} > 0 and finite, not {value}")

    @property
    def root(self) -> float:
        """√λ: both λ_A and μ_2."""
        return self.damping**0.5

    def size(self, n: int) -> int:
        """Examples in a minibatch. Raises: ValueError where that is more than n."""
        size = max(1, n // 4) if self.batch is None else self.batch
        if size > n:
            raise ValueError(f"a minibatch of {size} examples, but the problem has only {n}")
        return size

    def minibatches(self, n: int) -> Iterator[Tensor]:
        """Rows [batch] out of n, `steps` times, each drawn without replacement."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield torch.randperm(n, generator=generator)[: self.size(n)]


@dataclass(eq=False)
class LayerState:
    """K-BFGS's state of one layer, with the preconditioner H_g ⊗ H_a.

    H_g [out, out]; H_a, A [in+1, in+1]; M [out, in+1] the averaged gradient; s, y [out] the
    averaged changes of the mean pre-activation and of its mean gradient, before damping.
    A: mean over all examples of Σ_t a aᵀ, with one row per example averaged with each minibatch's.
    counts: of the events in `COUNTS`.
    """

    H_g: Tensor
    H_a: Tensor
    A: Tensor
    M: Tensor
    s: Tensor
    y: Tensor
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))


def replay_state(problem: Problem, block: Block, replay: Replay) -> LayerState:
    """State of the block's layer after the replay; kept by the problem, not to be changed.

    Raises: ValueError for a block that is not one whole layer of the replay, naming the reason;
    RuntimeError where not one pair of the layer could be used.
    """
    states = replayed(problem, replay)
    state = states.get(block.single) if block.single else None
    if state is None:
        raise ValueError(
            f"K-BFGS has no state of block '{block.name}': {_reason(problem, block)}; layers with "
            f"a state: {[member.module for member in states]}"
        )
    if not state.counts["pairs accepted"]:
        raise RuntimeError(
            f"K-BFGS learned nothing of layer '{block.name}': none of its {replay.steps} pairs "
            f"could be used: {state.counts['pairs not finite']} were not finite, the others had no "
            f"usable curvature (as where the gradient is zero); try another lr than {replay.lr:g}"
        )
    return state


def _reason(problem: Problem, block: Block) -> str:
    if block.single is None:
        return f"it is a group of {len(block.members)} layers, ask for each of them"
    name = block.single.module
    groups = getattr(problem.model.get_submodule(name), "groups", 1)
    if groups > 1:
        return f"a convolution in {groups} groups has no single input factor"
    if (layer := layers(problem).get(name)) is None:
        return "no Linear, Conv1d or Conv2d layer acting on each example through its outputs alone"
    if layer.calls > 1:
        return f"layer '{name}' is called {layer.calls} times per pass, K-BFGS knows one call"
    return f"it is not the whole of layer '{name}', ask for that"


def replayed(problem: Problem, replay: Replay) -> dict[Member, LayerState]:
    """States after a replay in all layers jointly, by the layer's member; kept by the problem.

    Layers are Linear, and Conv1d and Conv2d without groups, called once per pass.
    """
    shapes = [block.members[0].matrix_shape for block in problem.blocks()]
    size = 8 * sum(o * o + 2 * i * i + o * i for o, i in shapes)
    return problem.remember(("kbfgs", replay), lambda: _replayed(problem, replay), size)


def _replayed(problem: Problem, replay: Replay) -> dict[Member, LayerState]:
    if not (seen := seen_layers(problem)):
        return {}
    states = {layer.member: _start(layer, replay) for layer in seen}
    for step, rows in enumerate(replay.minibatches(problem.n)):
        rows = rows.to(problem.inputs.device)
        shifts: dict[str, Tensor] = {}
        for layer in seen:
            p = _direction(states[layer.member], layer, rows, replay, first=step == 0)
            shifts |= layer.member.split(replay.lr * p.flatten())
        for layer, change in zip(seen, trial(problem, seen, rows, shifts), strict=True):
            # K-BFGS does not average the pairs of full batches
            decay = DECAY if len(rows) < problem.n else 0.0
            _learn(states[layer.member], change, decay, layer.by_rows, replay.root)
    return states


def _start(layer: LayerPass, replay: Replay) -> LayerState:
    """Initial state: H_g = I, H_a = (A + λ_A I)⁻¹ with A of all examples."""
    o, i = layer.member.matrix_shape
    some = max(1, CHUNK_BYTES // (8 * i * layer.z.shape[1]))
    parts = torch.arange(len(layer.x), device=layer.x.device).split(some)
    A = torch.stack([len(part) * _second_moment(layer.a(part)) for part in parts]).sum(0)
    A = A / len(layer.x)
    eye = torch.eye(i).to(A)
    H_a = torch.cholesky_solve(eye, torch.linalg.cholesky(A + replay.root * eye))
    zero = A.new_zeros(o)
    return LayerState(torch.eye(o).to(A), H_a, A, A.new_zeros(o, i), zero, zero)


def _second_moment(a: Tensor) -> Tensor:
    """(1/m) Σ_n Σ_t a aᵀ [i, i] of a [m, T, i]."""
    flat = a.flatten(0, 1)
    return flat.T @ flat / len(a)


def _direction(
    state: LayerState, layer: LayerPass, rows: Tensor, replay: Replay, first: bool
) -> Tensor:
    """Direction p = -H_g M H_a [out, in+1], after M <- 0.9 M + 0.1 ∇ of the minibatch.

    Then A and H_a see the minibatch; the first leaves A alone, which is of all the data then.
    """
    a = layer.a(rows)
    gradient = torch.einsum("nto,nti->oi", layer.g[rows], a) / len(rows)
    state.M = DECAY * state.M + (1 - DECAY) * gradient
    p = -state.H_g @ state.M @ state.H_a
    if layer.by_rows and not first:
        state.A = DECAY * state.A + (1 - DECAY) * _second_moment(a)
    _act(state, a, layer.by_rows, replay.root)
    return p


def _act(state: LayerState, a: Tensor, by_rows: bool, lambda_a: float) -> None:
    """Hessian action: BFGS on H_a with s = H_a x̄ and y = (A + λ_A I) s, x̄ the mean row of a.

    Where positions share the weights, A is the minibatch's own and is never formed.
    """
    x = a.mean((0, 1))
    s = state.H_a @ x
    acted = state.A @ s if by_rows else torch.einsum("nti,nt->i", a, a @ s) / len(a)
    new = updated(state.H_a, s, acted + lambda_a * s, x)
    state.counts["actions skipped" if new is None else "actions accepted"] += 1
    state.H_a = state.H_a if new is None else new


def _learn(state: LayerState, change: Change, decay: float, by_rows: bool, mu_2: float) -> None:
    """Average the pair, damp it and update H_g by it; skip a pair that is not finite."""
    if not all(torch.isfinite(part).all() for part in change):
        state.counts.update(["pairs not finite", "pairs skipped"])
        return
    state.s = decay * state.s + (1 - decay) * change.s
    state.y = decay * state.y + (1 - decay) * change.y
    pair = (damp_twice if by_rows else damp_always)(state.s, state.y, state.H_g, mu_2)
    new = None if pair is None else updated(state.H_g, pair.s, pair.y, change.slope)
    state.counts["pairs skipped" if new is None else "pairs accepted"] += 1
    state.H_g = state.H_g if new is None else new
    if pair is not None:
        state.counts["first damping fired"] += pair.first
        state.counts["second damping fired"] += pair.second
