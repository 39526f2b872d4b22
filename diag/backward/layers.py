"""Inputs and outputs of layers in a forward pass, and which layers a truth may be built from.

A layer qualifies if its parameters act through its pre-activations alone: its inputs and the
curvature at its outputs then determine its block. This is checked numerically.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from ..problem.functional import call
from ..problem.problem import Problem
from .patches import PATCHES, by_position, patches, per_group

FEW = 3  # examples on which a layer's qualification is checked


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its input and its output, the latter in the autograd graph."""

    x: Tensor
    z: Tensor


LayerCalls = dict[str, list[LayerCall]]


@contextmanager
def recording(model: nn.Module, modules: Sequence[str]) -> Iterator[LayerCalls]:
    """Context that records every call of the named modules; their outputs require gradients."""
    calls: LayerCalls = {}
    handles = []
    for name in modules:

        def record(_m: nn.Module, args: tuple, z: Tensor, name: str = name) -> Tensor:
            z = z if z.requires_grad else z.requires_grad_()
            calls.setdefault(name, []).append(LayerCall(args[0].detach(), z))
            return z.clone()  # what follows may work in place; z itself stays as it is

        handles.append(model.get_submodule(name).register_forward_hook(record))
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class QualifiedLayer:
    """Calls per pass, shape of one example's z, and whether z is the model's output."""

    calls: int
    shape: torch.Size
    last: bool = False

    @property
    def rows(self) -> bool:
        """Whether it is called once with one row per example."""
        return self.calls == 1 and len(self.shape) == 1

    @property
    def floats(self) -> int:
        """Entries of all its pre-activations of one example."""
        return self.calls * self.shape.numel()


def layers(problem: Problem) -> dict[str, QualifiedLayer]:
    """The layers that qualify, in calling order; found once per problem.

    A Linear, Conv1d or Conv2d (no subclass) qualifies if no other module shares its parameters,
    examples are its first dimension and do not interact, and its gradient is Σ_t g_t a_tᵀ over its
    calls and positions.
    """
    return problem.remember("layers", lambda: _qualified(problem), 0)


def _qualified(problem: Problem) -> dict[str, QualifiedLayer]:
    model, few = problem.model, min(FEW, problem.n)
    owners = [name.rpartition(".")[0] for name in problem.trainable]
    names = [
        name
        for name in dict.fromkeys(owners)
        if type(model.get_submodule(name)) in PATCHES and not _shared(model, name)
    ]
    inputs, targets = problem.inputs[:few], problem.targets[:few]
    with recording(model, names) as calls:
        outputs = model(inputs)
        summed = len(inputs) * problem.loss(outputs, targets)
    sound = [n for n in calls if _by_example(calls[n], few)]
    if not sound or not summed.requires_grad:  # the model calls them without gradients
        return {}
    zs = [call.z for name in sound for call in calls[name]]
    g = iter(torch.autograd.grad(summed, zs, retain_graph=True, allow_unused=True))
    slopes = {n: [next(g) for _ in calls[n]] for n in sound}
    apart = {n: all(_apart(outputs, call.z) for call in calls[n]) for n in sound}
    exact = _gradients(problem, sound, inputs, targets)
    return {
        n: QualifiedLayer(len(calls[n]), calls[n][0].z.shape[1:], _is_output(calls[n], outputs))
        for n in calls  # in calling order
        if n in sound and apart[n] and _complete(model, n, calls[n], slopes[n], exact)
    }


def _shared(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name)
    own = {id(p) for p in module.parameters(recurse=False)}
    others = (m for m in model.modules() if m is not module)
    return any(id(p) in own for m in others for p in m.parameters(recurse=False))


def _by_example(calls: Sequence[LayerCall], n: int) -> bool:
    """Whether all calls have one shape with an entry per example."""
    return len({call.z.shape for call in calls}) == 1 and all(
        len(call.x) == len(call.z) == n for call in calls
    )


def _apart(outputs: Tensor, z: Tensor) -> bool:
    """Whether the first and last output depend on their own entry of z alone."""
    for own in (0, len(z) - 1):
        with torch.enable_grad():
            own_sum = outputs[own].sum()
        found = torch.autograd.grad(own_sum, z, retain_graph=True, allow_unused=True)[0]
        if found is not None and any(found[j].any() for j in range(len(z)) if j != own):
            return False
    return True


def _is_output(calls: Sequence[LayerCall], outputs: Tensor) -> bool:
    """Whether the outputs are the recording's copy of z."""
    node = outputs.grad_fn
    if node is None or node.name() != "CloneBackward0" or len(calls) > 1:
        return False
    return node.next_functions[0][0] is get_gradient_edge(calls[0].z).node


def _gradients(
    problem: Problem, names: Sequence[str], inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Gradient of the summed loss of these examples, by parameter name."""
    model = problem.model
    wanted = {
        p: model.get_parameter(p).detach().requires_grad_()
        for p in problem.trainable
        if p.rpartition(".")[0] in names
    }
    if not wanted:
        return {}
    with torch.enable_grad():
        outputs = call(model, wanted, inputs)
        summed = len(inputs) * problem.loss(outputs, targets)
        found = torch.autograd.grad(summed, list(wanted.values()), allow_unused=True)
    pairs = zip(wanted.items(), found, strict=True)
    return {n: torch.zeros_like(p) if f is None else f for (n, p), f in pairs}


def _complete(
    model: nn.Module,
    name: str,
    calls: Sequence[LayerCall],
    slopes: Sequence[Tensor | None],
    exact: dict[str, Tensor],
) -> bool:
    """Whether Σ g aᵀ over the layer's calls is its whole gradient."""
    module = model.get_submodule(name)
    pairs = [(c.x, g) for c, g in zip(calls, slopes, strict=True) if g is not None]
    if not pairs:
        return False
    total = torch.stack([summed_products(module, x, g) for x, g in pairs]).sum(0)
    weight = module.get_parameter("weight")
    parts = {"weight": total[:, :-1].reshape(weight.shape), "bias": total[:, -1]}
    # float32 gradients of deep networks agree to a few digits only; a missing use is far off
    slack = 1e-9 if total.dtype == torch.float64 else 1e-3
    return all(
        (found - exact[f"{name}.{local}"]).abs().max() <= slack * float(total.abs().max())
        for local, found in parts.items()
        if f"{name}.{local}" in exact
    )


def summed_products(module: nn.Module, x: Tensor, g: Tensor) -> Tensor:
    """Σ_n Σ_t g_nt a_ntᵀ over one call, [out, in+1]."""
    a = patches(module, x)
    b = per_group(by_position(module, g), a.shape[1])  # [N, groups, T, out/groups]
    return torch.einsum("ngto,ngti->goi", b, a).flatten(0, 1)
