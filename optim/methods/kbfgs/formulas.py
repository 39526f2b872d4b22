"""K-BFGS's updates of H_g and H_a for the layers of one stack."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...core.errors import NumericalError
from ...core.stacks import Stack
from ...linalg.basics import damped_inverse
from ...linalg.operators import CompactInverse
from ...linalg.products import product, sandwich
from .bfgs import acceptable, append_, bfgs_, broken, double_damping, powell_and_shift, times
from .statistics import patch_moments


def held_h_g(stack: Stack) -> Tensor | CompactInverse:
    """H_g as the stack holds it: dense, or by its last pairs."""
    if "H_g" in stack:
        return stack["H_g"]
    return CompactInverse(stack["S"], stack["Y"], stack["R"], stack["YY"])


def applied(stack: Stack) -> Tensor:
    """P = H_g M H_a [size, out, in+1], M the momentum."""
    M, H_g, H_a = stack["momentum"], held_h_g(stack), stack["H_a"]
    if isinstance(H_g, CompactInverse):
        return product(H_g @ M, H_a)
    return sandwich(H_g, M, H_a)


def start_h_g(stack: Stack, blocks: Iterable[Block], history: int | None) -> None:
    """H_g = I of blocks that begin, no pairs yet."""
    out = stack.shape[0]
    p = history or out
    square = ("H_g", stack.eyes(out)) if history is None else ("R", stack.eyes(p))
    start = dict([square], s=stack.zeros(out), y=stack.zeros(out))
    if history is not None:
        start |= {"S": stack.zeros(p, out), "Y": stack.zeros(p, out), "YY": stack.zeros(p, p)}
    _begin(stack, blocks, start)


def start_h_a(stack: Stack, blocks: list[Block], A: Tensor, lambda_a: float) -> None:
    """H_a = (A + λ_A I)⁻¹ of blocks that begin; a convolution keeps no A.

    Raises: NumericalError naming a layer for which that is not possible.
    """
    damping = A.new_full((len(A),), lambda_a)
    H_a, ok = damped_inverse(A, damping)
    wanted = stack.mask(blocks)
    if not bool((ok | ~wanted).all()):  # before the first step: waiting is no loss
        again, good = damped_inverse(A.double(), damping.double())
        H_a = torch.where(ok[:, None, None], H_a, again.to(H_a.dtype))
        for block in blocks:
            if not bool((ok | good)[stack.places[block]].all()):
                raise NumericalError(
                    f"layer '{block.name}': A + √damping I cannot be inverted; look for inputs "
                    "that are not finite or very large, scale them, or raise the damping"
                )
    _begin(stack, blocks, {"H_a": H_a} if stack.convolutional else {"A": A, "H_a": H_a})


def _begin(stack: Stack, blocks: Iterable[Block], start: dict[str, Tensor]) -> None:
    """Give these blocks their part of the tensors, leave the other blocks' as they are."""
    for key, value in start.items():
        if key not in stack:
            stack.hold(**{key: value.clone()})
        for block in blocks:
            stack.of(block, key).copy_(value[stack.places[block]])


def update_h_g_(
    stack: Stack, gradient: Tensor, mu_2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One damped BFGS update of H_g by the averaged pair; gradient: ḡ [size, out] of the skip rule.

    Returns: where it was accepted, where Powell's damping fired, where the second, and where H_g
    was found broken; [size] bool.
    """
    H = held_h_g(stack)
    damped = powell_and_shift if stack.convolutional else double_damping
    pair = damped(stack["s"], stack["y"], H, mu_2)
    accept = pair.valid & acceptable(pair.s, pair.y, gradient)
    store = append_ if isinstance(H, CompactInverse) else bfgs_
    accept = store(H, pair.s, pair.y, accept)  # type: ignore[arg-type]
    return accept, pair.powell & pair.valid, pair.second & pair.valid, pair.broken


def input_action_(
    stack: Stack, x: Tensor, lambda_a: float, totals: dict[Block, Totals]
) -> tuple[Tensor, Tensor]:
    """BFGS on H_a with the exact pair s = H_a x̄, y = (A + λ_A I) s; no damping is needed.

    A convolution's A is the minibatch's own, which is never formed (arXiv:2102.06737).

    Returns: where it was accepted, and where H_a was found broken; [size] bool.
    """
    s = times(stack["H_a"], x)
    As = patch_moments(stack, totals, s) if stack.convolutional else times(stack["A"], s)
    y, bad = As.add_(s, alpha=lambda_a), broken(s, x)
    accept = acceptable(s, y, x) & ~bad & stack.mask(totals)
    return bfgs_(stack["H_a"], s, y, accept), bad
