"""Forward and backward passes of a K-BFGS replay: at θ, and of a minibatch at θ + lr p."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...backward.layers import layers, recording
from ...backward.patches import by_position, patches
from ...backward.positions import columns_of
from ...problem import Member, Problem, functional


@dataclass(frozen=True, eq=False)
class LayerPass:
    """A layer's inputs x [N, ...], pre-activations z, gradients g = ∂ℓ_n/∂z [N, T, out] at θ."""

    member: Member
    module: nn.Module
    by_rows: bool  # one row per example, rather than positions that share the weights
    x: Tensor
    z: Tensor
    g: Tensor

    def a(self, rows: Tensor) -> Tensor:
        """Inputs of the layer in these examples, 1 appended, [m, T, in+1]."""
        return patches(self.module, self.x[rows])[:, 0, :, columns_of(self.member)]


class Change(NamedTuple):
    """Changes s, y [out] of a layer by a trial step, and its mean gradient ḡ [out] before it."""

    s: Tensor
    y: Tensor
    slope: Tensor


@torch.enable_grad()  # whoever asks may have switched it off
def seen_layers(problem: Problem) -> list[LayerPass]:
    """Layers that K-BFGS knows, by one pass over all examples at θ; [] if there are none."""
    members = {block.members[0].module: block.members[0] for block in problem.blocks()}
    modules = {name: problem.model.get_submodule(name) for name in members}
    known = {
        name: layer
        for name, layer in layers(problem).items()
        if name in members and layer.calls == 1 and getattr(modules[name], "groups", 1) == 1
    }
    if not known:
        return []
    every = torch.arange(problem.n, device=problem.inputs.device)
    passed = _pass(problem, list(known), every, {})
    return [
        LayerPass(members[name], modules[name], known[name].rows, *found)
        for name, found in zip(known, passed, strict=True)
    ]


def _pass(
    problem: Problem, names: Sequence[str], rows: Tensor, shifts: dict[str, Tensor]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, z and g of each layer named, on these examples, at the parameters plus `shifts`."""
    model = problem.model
    moved = {name: model.get_parameter(name) + shift for name, shift in shifts.items()}
    with recording(model, names) as calls:
        outputs = functional.call(model, moved, problem.inputs[rows])
        summed = len(rows) * problem.loss(outputs, problem.targets[rows])
        own = [calls[name][0] for name in names]
        slopes = torch.autograd.grad(summed, [call.z for call in own], materialize_grads=True)
    found = []
    for name, call, g in zip(names, own, slopes, strict=True):
        module = model.get_submodule(name)
        found.append((call.x, by_position(module, call.z.detach()), by_position(module, g)))
    return found


def trial(
    problem: Problem, seen: Sequence[LayerPass], rows: Tensor, shifts: dict[str, Tensor]
) -> Iterator[Change]:
    """Changes of each layer from θ to θ + lr p, means over examples and positions."""
    passed = _pass(problem, [layer.member.module for layer in seen], rows, shifts)
    for layer, (_, z, g) in zip(seen, passed, strict=True):
        before = layer.g[rows]
        changes = (z - layer.z[rows], g - before, before)
        yield Change(*(change.mean((0, 1)) for change in changes))
