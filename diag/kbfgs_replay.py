"""K-BFGS replayed at fixed parameters: the state its updates build from a problem's own data.

Every step draws a minibatch of the problem's examples, takes K-BFGS's direction p = -H_g M H_a in
all layers at once, evaluates the same minibatch again at θ + lr p, and updates H_g and H_a of each
layer by what it saw there. Then the parameters are θ again, so that the state belongs to the point
where the truth is taken. Nothing of `optim` is used: this follows the papers once more.
Source: Goldfarb, Ren and Bahamou 2020 (arXiv:2006.08877) for Linear layers with one row per
example; Ren, Bahamou and Goldfarb 2021 (arXiv:2102.06737) for layers with positions.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diag.blocks import Block, Member
from diag.damped_bfgs import damp_always, damp_twice, updated
from diag.layer_passes import Layer, reasons, record, unshifted
from diag.problem import Problem

DECAY = 0.9  # of the averages M, A, s and y
CHUNK_BYTES = 2**28  # memory for the patches that one sum over all examples unfolds at once
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
    """How K-BFGS is replayed.

    damping: λ > 0; λ_A = μ_2 = √λ. steps: minibatches, each with one update of H_g and H_a.
    batch: examples per minibatch, None for a quarter of them. lr: the trial step is θ + lr p; both
    dampings and the skip rule are blind to the length of the pair, so a small one only brings
    (s, y) closer to the curvature at θ itself. seed: of the minibatches.

    Raises: ValueError for a damping, lr, batch or number of steps that is not positive.
    """

    damping: float = 0.3
    steps: int = 50
    batch: int | None = None
    lr: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("damping", "lr", "steps", "batch"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"a K-BFGS replay needs {name} > 0 and finite, not {value}")

    def minibatches(self, n: int) -> Iterator[Tensor]:
        """`steps` times the rows [batch] of a minibatch, drawn without replacement.

        Raises: ValueError for a batch of more than n examples.
        """
        batch = self.size(n)
        if batch > n:
            raise ValueError(f"a minibatch of {batch} examples: the problem has only {n}")
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(self.steps):
            yield torch.randperm(n, generator=generator)[:batch]

    def size(self, n: int) -> int:
        """Examples in a minibatch out of n."""
        return max(1, n // 4) if self.batch is None else self.batch

    @property
    def root(self) -> float:
        """√λ, which is both λ_A and μ_2."""
        return self.damping**0.5


@dataclass(eq=False)
class State:
    """What K-BFGS holds of one layer; its preconditioner is H_g ⊗ H_a.

    H_g [out, out]; H_a, A [in+1, in+1]; M [out, in+1] the averaged gradient; s, y [out] the
    averaged changes of the mean pre-activation and of the mean of its gradient, before damping.
    A: E[a aᵀ], for layers with positions the sum over them: of all examples at the start, then,
    for one row per example, a running average over minibatches. counts: by the names in `COUNTS`.
    """

    H_g: Tensor
    H_a: Tensor
    A: Tensor
    M: Tensor
    s: Tensor
    y: Tensor
    counts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(COUNTS, 0)))


def state_of(problem: Problem, block: Block, replay: Replay) -> State:
    """The state of the block's layer after the replay, kept by the problem.

    Raises: ValueError for a block that is no whole layer K-BFGS has a state of, naming the reason;
    RuntimeError where not one pair of the layer could be used.
    """
    found = states(problem, replay)
    state = found.get(block.single) if block.single else None
    if state is None:
        raise ValueError(
            f"K-BFGS keeps one state per layer and has none of block '{block.name}': "
            f"{reasons(problem, block)}; layers it has: {[m.module for m in found]}"
        )
    if not state.counts["pairs accepted"]:
        raise RuntimeError(
            f"K-BFGS learned nothing of layer '{block.name}': none of its {replay.steps} pairs "
            f"could be used ({state.counts['pairs not finite']} not finite, the others without "
            f"curvature, as where the gradient is zero); another lr= than {replay.lr:g} may help"
        )
    return state


def states(problem: Problem, replay: Replay) -> dict[Member, State]:
    """Replay K-BFGS in all layers jointly; kept by the problem.

    The layers are those called once with examples first: Linear layers, and convolutions without
    groups. All other parameters stay at θ.
    """
    shapes = [block.members[0].matrix_shape for block in problem.blocks()]
    size = 8 * sum(o * o + 2 * i * i + o * i for o, i in shapes)
    return problem.remember(("kbfgs", replay), lambda: _replayed(problem, replay), size)


def _replayed(problem: Problem, replay: Replay) -> dict[Member, State]:
    layers = record(problem)
    known = {layer.member: _start(layer, replay) for layer in layers}
    for step, rows in enumerate(replay.minibatches(problem.n)):
        rows = rows.to(problem.inputs.device)
        shifts: dict[str, Tensor] = {}
        for layer in layers:
            p = _direction(known[layer.member], layer, rows, replay, first=step == 0)
            shifts |= layer.member.split(replay.lr * p.flatten())
        trial = unshifted(problem, layers, rows, shifts)
        for layer, (z, g) in zip(layers, trial, strict=True):
            _learn(known[layer.member], layer.pair(rows, z, g), layer, replay, problem.n)
    return known


def _start(layer: Layer, replay: Replay) -> State:
    """H_g = I, H_a = (A + λ_A I)⁻¹ with A of all examples: what K-BFGS's pass over the data does."""
    o, i = layer.member.matrix_shape
    each = max(1, CHUNK_BYTES // (8 * i * layer.positions))
    rows = torch.arange(len(layer.x), device=layer.x.device).split(each)
    A = torch.stack([_second_moment(layer.a(part)) * len(part) for part in rows]).sum(0)
    A /= len(layer.x)
    eye = torch.eye(i).to(A)
    H_a = torch.cholesky_inverse(torch.linalg.cholesky(A + replay.root * eye))
    zero = A.new_zeros(o)
    return State(torch.eye(o).to(A), H_a, A, A.new_zeros(o, i), zero, zero)


def _second_moment(a: Tensor) -> Tensor:
    """(1/m) Σ_n Σ_t a aᵀ, [i, i], of a [m, T, i]."""
    flat = a.flatten(0, 1)
    return flat.T @ flat / len(a)


def _direction(state: State, layer: Layer, rows: Tensor, replay: Replay, first: bool) -> Tensor:
    """p = -H_g M H_a, [out, in+1], after M <- 0.9 M + 0.1 ∇ of the minibatch.

    Then A and H_a see the minibatch: what they need of it is known, and p has its old H_a.
    """
    a, g = layer.a(rows), layer.g_at(rows)
    gradient = torch.einsum("nto,nti->oi", g, a) / len(rows)
    state.M = DECAY * state.M + (1 - DECAY) * gradient
    p = -state.H_g @ state.M @ state.H_a
    if not layer.shared and not first:
        state.A = DECAY * state.A + (1 - DECAY) * _second_moment(a)
    _act(state, a, layer.shared, replay.root)
    return p


def _act(state: State, a: Tensor, shared: bool, lambda_a: float) -> None:
    """Hessian action: BFGS on H_a by s = H_a x̄ and y = (A + λ_A I) s, x̄ the mean row of a.

    Layers with positions act with the minibatch's own A, which is never formed.
    """
    x = a.mean((0, 1))
    s = state.H_a @ x
    acted = torch.einsum("nti,nt->i", a, a @ s) / len(a) if shared else state.A @ s
    new = updated(state.H_a, s, acted + lambda_a * s, x)
    state.counts["actions skipped" if new is None else "actions accepted"] += 1
    state.H_a = state.H_a if new is None else new


def _learn(
    state: State, pair: tuple[Tensor, Tensor, Tensor], layer: Layer, replay: Replay, n: int
) -> None:
    """Average the new pair, damp it, and update H_g by it; a pair not finite touches nothing.

    pair: s and y of the minibatch, and its mean gradient ḡ at θ, for the skip rule.
    """
    s, y, gradient = pair
    if not (torch.isfinite(s).all() and torch.isfinite(y).all()):
        state.counts.update(["pairs not finite", "pairs skipped"])
        return
    decay = DECAY if replay.size(n) < n else 0.0  # K-BFGS does not average full-batch pairs
    state.s, state.y = (decay * old + (1 - decay) * new for old, new in ((state.s, s), (state.y, y)))
    damp = damp_always if layer.shared else damp_twice
    damped = damp(state.s, state.y, state.H_g, replay.root)
    new = None if damped is None else updated(state.H_g, damped.s, damped.y, gradient)
    state.counts["pairs skipped" if new is None else "pairs accepted"] += 1
    state.H_g = state.H_g if new is None else new
    if damped is not None:
        state.counts["first damping fired"] += damped.first
        state.counts["second damping fired"] += damped.second
