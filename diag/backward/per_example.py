"""Loss roots pulled back to parameters example by example, for parameters of no qualified layer.

Such are those of embeddings, norms, transposed convolutions and tied weights.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..problem.functional import call, plain_attention
from ..problem.problem import Problem


@plain_attention()
def per_example_roots(
    problem: Problem, names: Sequence[str], rows: slice, roots: Tensor
) -> dict[str, Tensor]:
    """Pull loss roots [k, n, *outputs] of the examples `rows` back: {name: [k, n, *shape]}.

    By vmap, or in a loop where a module does not support vmap or its result is wrong.
    """
    model = problem.model
    own = {name: model.get_parameter(name).detach() for name in names}

    def one(x: Tensor, ends: Tensor) -> dict[str, Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            return call(model, parameters, x[None])[0]

        pull = vjp(outputs, own)[1]
        return vmap(lambda end: pull(end)[0])(ends)

    try:
        found = vmap(one)(problem.inputs[rows], roots.movedim(1, 0))  # {name: [n, k, *shape]}
        sound = _agree(problem, own, rows, roots, found)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # some modules (nn.LSTM, data-dependent code) know no vmap
        sound = False
    if not sound:
        found = _by_loop(problem, own, rows, roots)
    return {name: each.movedim(1, 0) for name, each in found.items()}


def _agree(
    problem: Problem, own: dict[str, Tensor], rows: slice, roots: Tensor, found: dict[str, Tensor]
) -> bool:
    """Whether a weighted sum of the roots found is what one pass without vmap gives.

    vmap gives nn.PReLU's weight a silently wrong gradient for one root (torch 2.13).
    """
    wanted = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
    generator = torch.Generator().manual_seed(roots.numel())
    drawn = 1 + torch.rand(roots.shape[:2], generator=generator, dtype=torch.float64)
    weights = drawn.to(roots)
    with torch.enable_grad():
        z = call(problem.model, wanted, problem.inputs[rows])
    end = torch.einsum("kn,kn...->n...", weights, roots)
    sums = torch.autograd.grad(z, list(wanted.values()), end, materialize_grads=True)
    slack = 1e-9 if roots.dtype == torch.float64 else 1e-3  # a wrong gradient is far off
    for each, expected in zip(found.values(), sums, strict=True):
        total = torch.einsum("kn,nk...->...", weights, each)
        scale = torch.einsum("kn,nk...->...", weights, each.abs()).max()
        if (total - expected).abs().max() > slack * scale:
            return False
    return True


def _by_loop(
    problem: Problem, own: dict[str, Tensor], rows: slice, roots: Tensor
) -> dict[str, Tensor]:
    """The same in a loop over examples and roots."""
    wanted = {name: tensor.clone().requires_grad_() for name, tensor in own.items()}
    found: dict[str, list[Tensor]] = {name: [] for name in own}
    for j, x in enumerate(problem.inputs[rows]):
        with torch.enable_grad():
            z = call(problem.model, wanted, x[None])[0]
        pull = partial(torch.autograd.grad, z, list(wanted.values()))
        each = [pull(end, retain_graph=True, materialize_grads=True) for end in roots[:, j]]
        for name, grads in zip(own, zip(*each, strict=True), strict=True):
            found[name].append(torch.stack(grads))
    return {name: torch.stack(each) for name, each in found.items()}
