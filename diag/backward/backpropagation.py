"""Back-propagation of the loss roots to layers' pre-activations, a chunk of examples at a time.

Where every path from a layer to the outputs leads through one narrow layer of width w (an
autoencoder's code), the roots are condensed there to w with the same RᵀR.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from ..operators.batched import Diagonals, Outer
from ..problem.functional import plain_attention
from ..problem.problem import Problem
from .layers import LayerCall, LayerCalls, layers, recording

# floats back-propagated at once: buffers of this size stay in cache and in memory already touched
AT_ONCE = 2**22
NARROW = 8  # roots per unit of a layer's width from which condensing there pays
FEW = 16  # roots up to which one backward pass each is as fast as all at once


@dataclass(frozen=True)
class LayerRoots:
    """Inputs x and back-propagated roots b [k, n, *z] of each call of one layer."""

    x: list[Tensor]
    b: list[Tensor]


@dataclass(frozen=True)
class Chunk:
    """Examples `rows`, their loss roots [k, n, *outputs], and each layer's roots."""

    rows: slice
    roots: Tensor
    layers: dict[str, LayerRoots]


@dataclass(frozen=True)
class Stage:
    """One backward pass from a source layer (None: the outputs) to the target layers."""

    source: str | None
    targets: tuple[str, ...]


def backpropagate(
    problem: Problem, names: Sequence[str], roots: Diagonals | Outer, *, joint: bool = False
) -> Iterator[Chunk]:
    """Back-propagate roots to the named layers, which must be among `layers(problem)`.

    joint: the k-th roots of all layers belong together, as blocks across layers need; nothing is
    condensed.
    """
    known, k = layers(problem), count(roots)
    # any layer may be a place to condense at
    narrow = [
        n for n, layer in known.items() if layer.rows and NARROW * layer.shape[0] <= k and not joint
    ]
    modules = [n for n in known if n in names or n in narrow] if names else []
    step = _examples_at_once(problem, k, [known[n].floats for n in modules])
    stages: list[Stage] | None = None
    for start in range(0, problem.n, step):
        rows = slice(start, min(start + step, problem.n))
        with plain_attention(), recording(problem.model, modules) as calls:
            outputs = problem.model(problem.inputs[rows])
        ends = _some(roots, rows, outputs)
        if stages is None:
            stages = plan(outputs, calls, list(names), narrow) if names else []
        found = _passed_back(outputs, calls, ends, stages)
        got = {n: LayerRoots([call.x for call in calls[n]], found[n]) for n in names}
        yield Chunk(rows, ends, got)


def count(roots: Diagonals | Outer) -> int:
    """Number k of roots of each example."""
    return roots.size if isinstance(roots, Diagonals) else roots.roots.shape[1]


def _examples_at_once(problem: Problem, k: int, floats: Sequence[int]) -> int:
    """As many examples as keep one layer's roots in cache and all layers' in the budget.

    Without layers, a root takes as many floats as the model has parameters.
    """
    if not floats:
        floats = [sum(p.numel() for p in problem.model.parameters())]
    held = problem.budget // (16 * 8 * k * sum(floats))
    return max(1, min(AT_ONCE // (k * max(floats)), held))


def _some(roots: Diagonals | Outer, rows: slice, outputs: Tensor) -> Tensor:
    """The roots of these examples, [k, n, *outputs]."""
    if isinstance(roots, Diagonals):
        own = torch.diag_embed(roots.values[rows].sqrt())
    else:
        own = roots.roots[rows]
    return own.movedim(0, 1).reshape(-1, *outputs.shape)


def _passed_back(
    outputs: Tensor, calls: LayerCalls, roots: Tensor, stages: Sequence[Stage]
) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for stage in stages:
        source, ends = outputs, roots
        if stage.source is not None:
            source, ends = calls[stage.source][0].z, condensed(found[stage.source][0])
        targets = [call for name in stage.targets for call in calls[name]]
        passed = iter(_pull(source, targets, ends))
        found |= {name: [next(passed) for _ in calls[name]] for name in stage.targets}
    return found


def _pull(source: Tensor, targets: Sequence[LayerCall], ends: Tensor) -> list[Tensor]:
    """Gradients of <source, end> at each call's z for every end [k, *source], each [k, *z]."""
    zs = [call.z for call in targets]
    pull = partial(
        torch.autograd.grad,
        source,
        zs,
        retain_graph=True,
        allow_unused=True,
        materialize_grads=True,
    )
    if len(ends) > FEW:
        return list(pull(ends, is_grads_batched=True))
    each = [pull(end) for end in ends]
    return [torch.stack(passed) for passed in zip(*each, strict=True)]


def condensed(b: Tensor) -> Tensor:
    """At most w roots with the same Σ_k b bᵀ as b [k, n, w]: the R of a QR decomposition."""
    if len(b) <= b.shape[2]:
        return b
    return torch.linalg.qr(b.movedim(0, 1), mode="r").R.movedim(0, 1)


def plan(
    outputs: Tensor, calls: LayerCalls, names: list[str], narrow: Sequence[str]
) -> list[Stage]:
    """Backward passes that reach each layer from the nearest narrow layer on all its paths.

    Layers are in calling order; a stage's source is among the targets of an earlier stage.
    """
    nodes = {name: [get_gradient_edge(c.z).node for c in own] for name, own in calls.items()}
    start = get_gradient_edge(outputs).node
    order = list(calls)
    behind: dict[str, set[str]] = {}
    for cut in narrow:
        seen = _reached(start, nodes[cut][0])
        earlier = order[: order.index(cut)]
        behind[cut] = {n for n in earlier if not seen.intersection(nodes[n])}
    sources: dict[str, str | None] = {}
    wanted = list(names)
    for name in wanted:  # grows by the sources of those in it
        cuts = [cut for cut in order if name in behind.get(cut, ())]
        sources[name] = cuts[0] if cuts else None
        if cuts and cuts[0] not in wanted:
            wanted.append(cuts[0])
    stages = [Stage(None, tuple(n for n, s in sources.items() if s is None))]
    waiting = [n for n, s in sources.items() if s is not None]
    while waiting:
        ready = {n for stage in stages for n in stage.targets}
        source = next(s for n in waiting if (s := sources[n]) in ready)
        stages.append(Stage(source, tuple(n for n in waiting if sources[n] == source)))
        waiting = [n for n in waiting if sources[n] != source]
    return stages


def _reached(start: Node, barrier: Node) -> set[Node]:
    """Autograd nodes reached from `start` without passing `barrier`."""
    seen, todo = {start}, [start]
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None and node is not barrier and node not in seen:
                seen.add(node)
                todo.append(node)
    return seen
