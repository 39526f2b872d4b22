"""Tensors with one matrix per axis, which Shampoo and TNT share.

H_i [n_i, n_i] averages the contractions of a gradient with itself over all axes but i.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..blocks.blocks import Block, Variable, find_variables
from ..linalg.basics import is_finite, known_true, per
from ..linalg.operators import Identity, Kronecker, Operator
from ..linalg.products import gram_, product
from .harness import Harness
from .stacks import Stack

LONGEST = 8192  # length of an axis (of a large vocabulary) beyond which it gets no matrix
FIXED = f"axes longer than {LONGEST} get no matrix"  # in place of an option of earlier versions


def variable_shape(module: nn.Module, parameter: Tensor) -> tuple[int, ...]:
    """A matrix as it is, a convolution's weight as (O, I/groups, kh*kw), else one axis."""
    if isinstance(module, _ConvNd) and parameter.ndim > 2:
        return parameter.shape[0], parameter.shape[1], parameter[0, 0].numel()
    return tuple(parameter.shape) if parameter.ndim == 2 else (parameter.numel(),)


def variables(model: nn.Module) -> list[Variable]:
    """Trainable parameters of a model; axes up to the length `LONGEST` get a matrix."""
    return find_variables(model, variable_shape, LONGEST)


def axes_of(stack: Stack) -> tuple[int, ...]:
    """The axes that get a matrix."""
    variable: Any = stack.blocks[0]
    return variable.axes


def names(stack: Stack, kind: str) -> dict[int, str]:
    """{axis: name in the state} of one kind of matrix: "H_1" is that of axis 0."""
    return {i: f"{kind}_{i + 1}" for i in axes_of(stack)}


def unfolded(X: Tensor, i: int) -> Tensor:
    """Axis i of X [b, *shape] as columns, [b, rest, n_i]."""
    return X.movedim(i + 1, -1).reshape(len(X), -1, X.shape[i + 1])


def along(X: Tensor, i: int, A: Tensor) -> Tensor:
    """A symmetric A [b, n_i, n_i] multiplied to axis i of X [b, *shape].

    By hand, the second axis:
        >>> along(torch.ones(1, 2, 2), 1, torch.diag(torch.tensor([1.0, 2.0]))[None]).tolist()
        [[[1.0, 2.0], [1.0, 2.0]]]
    """
    if i == X.ndim - 2:
        return product(X.reshape(len(X), -1, X.shape[-1]), A).reshape(X.shape)
    moved = X.movedim(i + 1, 1)
    return product(A, moved.flatten(2)).reshape(moved.shape).movedim(1, i + 1)


def learn_contractions(
    stack: Stack, G: Tensor, keep: float, new: float, live: Iterable[Block]
) -> Tensor:
    """H_i <- keep H_i + new (G contracted with itself over all axes but i), G [size, *shape].

    A matrix G has G Gᵀ and Gᵀ G, a vector g gᵀ. One whose squares are not finite is left out.

    Returns: which of the stack learned, [size] bool.
    """
    held = names(stack, "H")
    for i, name in held.items():
        if name not in stack:
            stack.hold(**{name: stack.zeros(stack.shape[i], stack.shape[i])})
    ok = is_finite(torch.linalg.vector_norm(G.flatten(1), dim=1).square()) & stack.mask(live)
    every = known_true(ok)
    if not every:
        G = G.nan_to_num(0.0, 0.0, 0.0) * per(ok, G)
    for i, name in held.items():
        if not every:
            stack[name].mul_(1 - (1 - keep) * per(ok, stack[name]))
        gram_(stack[name], unfolded(G, i), beta=keep if every else 1.0, alpha=new)
    return ok


def applied(stack: Stack, kind: str, X: Tensor) -> Tensor:
    """The matrices of this kind multiplied to X [size, *shape] along their axes; not X itself."""
    for i, name in names(stack, kind).items():
        X = along(X, i, stack[name])
    return X if axes_of(stack) else X.clone()


def operator(stack: Stack, matrix: Callable[[int], Tensor]) -> Operator | None:
    """Kronecker product of the axes' matrices on a row-major parameter; None if it has none.

    matrix(axis) -> [n, n]; axes without one get the identity.
    """
    axes = axes_of(stack)
    if not axes:
        return None
    factors: list[Operator] = [
        matrix(i) if i in axes else Identity(n) for i, n in enumerate(stack.shape)
    ]
    return reduce(Kronecker, factors)


def learn(harness: Harness, stack: Stack, live: list[Block], G: Tensor) -> None:
    """One update of a stack by the gradients G of these blocks, counted."""
    harness.start(stack, live)
    keep = stack.group["decay"]
    ok = learn_contractions(stack, G, keep, 1 - keep, live)
    harness.learned(stack, ok, live)


def warm(harness: Harness, found: Iterable[tuple[int, dict[Stack, Tensor]]]) -> None:
    """Every H_i as the mean over (1, 2, ...) batches of what they found."""
    for batch, gradients in found:
        with harness.exact():
            for stack, G in gradients.items():
                harness.start(stack, stack.blocks)
                ok = learn_contractions(stack, G, 1 - 1 / batch, 1 / batch, stack.blocks)
                harness.count(stack, {"not finite": ~ok})
