"""Momentum, weight decay and parameter updates; a gradient that is not finite changes nothing.

On a CPU, where values can be read at once, masks are left out when all is finite.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..blocks.blocks import Block
from ..linalg.basics import (
    all_finite,
    factor_dtype,
    finite,
    is_finite,
    known_finite,
    known_true,
    per,
)
from .stacks import Stack

Group = dict[str, Any]
Groups = dict[Tensor, Group]
Form = Callable[[float], tuple[float, float]]


def average(momentum: float) -> tuple[float, float]:
    """M <- momentum M + (1 - momentum) ∇."""
    return momentum, 1 - momentum


def heavy_ball(momentum: float) -> tuple[float, float]:
    """M <- momentum M + ∇, whose learning rates are smaller by 1 - momentum."""
    return momentum, 1.0


def gradient_of(parameter: Tensor) -> Tensor:
    """The parameter's .grad. Raises: ValueError for a sparse one."""
    if parameter.grad is None or parameter.grad.is_sparse:
        raise ValueError("sparse gradients are not supported; use sparse=False in the embedding")
    return parameter.grad


def gradients_finite(stack: Stack, live: Iterable[Block]) -> Tensor:
    """Which matrices have a finite gradient, [size] bool; False for blocks that are not live."""
    live = list(live)
    if all(known_finite(gradient_of(p)) for block in live for p in block.parameters):
        return stack.mask(live)
    out = torch.zeros(stack.size, dtype=torch.bool, device=stack.device)
    for block in live:
        sums = [gradient_of(p).sum(dtype=stack.dtype) for p in block.parameters]
        out[stack.places[block]] = is_finite(sum(sums[1:], sums[0]))
    return out


def gradient(stack: Stack, live: Iterable[Block], groups: Groups, *, decay: bool = True) -> Tensor:
    """∇ [size, out, in+1] of W_bar, with coupled weight decay unless decay=False.

    Zero for blocks that are not live; a NaN stays one (`gradients_finite` tells where).
    """
    out = stack.zeros(*stack.shape)
    for block in live:
        for p, part in block.parts(out[stack.places[block]]):
            part.copy_(gradient_of(p).reshape(part.shape))
            tau = coupled(groups[p])
            if decay and tau:
                part.add_(p.reshape(part.shape), alpha=tau)
    return out


def absorb_(
    stack: Stack, live: list[Block], groups: Groups, form: Form, ok: Tensor | None = None
) -> Tensor:
    """stack["momentum"] <- keep M + new (∇ + τ W_bar), τ of `coupled`, where ∇ is finite.

    ok: whose gradient is finite, [size] bool, if somebody has looked.

    Returns: whose gradient was finite, [size] bool.
    """
    if "momentum" not in stack:
        stack.hold(momentum=stack.zeros(*stack.shape))
    keep, new = form(stack.group["momentum"])
    M = stack["momentum"]
    if ok is None or not known_true(ok):
        ok = gradients_finite(stack, live)
    if len(live) == len(stack.blocks) and known_true(ok):
        for block in live:
            for p, part in block.parts(M[stack.places[block]]):
                g = gradient_of(p).reshape(part.shape).to(M.dtype)
                if tau := coupled(groups[p]):
                    g = torch.add(g, p.reshape(part.shape), alpha=tau)
                # by either form memory is read and written once
                if new == 1.0:
                    torch.add(g, part, alpha=keep, out=part)
                else:
                    part.lerp_(g, new)  # keep + new = 1
        return ok
    G = gradient(stack, live, groups).nan_to_num_(0.0, 0.0, 0.0)
    weight = per(ok, M)
    M.mul_(1 + weight * (keep - 1)).add_(G.mul_(weight), alpha=new)
    return ok


def move_(stack: Stack, live: Iterable[Block], P: Tensor, ok: Tensor, groups: Groups) -> Tensor:
    """W_bar <- W_bar - lr P where ok and P [size, out, in+1] is finite; spoils P.

    Decoupled weight decay, where a group asks for it, comes first: W_bar <- (1 - lr τ) W_bar.

    Returns: which matrices moved, [size] bool; `ok` itself where all of P is known to be finite.
    """
    if not known_finite(P):
        ok = ok & finite(P)
    if not known_true(ok):
        P = P.nan_to_num_(0.0, 0.0, 0.0).mul_(per(ok, P))
    for block in live:
        own = P[stack.places[block]]
        for p, part in block.parts(own):
            if shrink := decoupled(groups[p]):
                one = per(ok[stack.places[block]], own).amin()
                p.mul_(1 - shrink * one.to(p.dtype))
            p.add_(part.reshape(p.shape), alpha=-groups[p]["lr"])
    return ok


def plain_step_(parameter: Tensor, state: dict[str, Tensor], group: Group, form: Form) -> None:
    """θ <- θ - lr M with the momentum of the method around it, for a parameter without a block.

    A gradient that is not finite is counted and changes nothing.
    """
    if not state:
        state["momentum"] = torch.zeros_like(parameter, dtype=factor_dtype(parameter))
        state["nonfinite"] = torch.zeros((), dtype=torch.int64, device=parameter.device)
    (keep, new), M = form(group["momentum"]), state["momentum"]
    g = gradient_of(parameter).to(M.dtype)
    if tau := coupled(group):
        g = torch.add(g, parameter, alpha=tau)
    moved = torch.add(M * keep, g, alpha=new)
    ok = all_finite(moved)  # a heavy ball overflows before its gradient does
    if known_true(ok):
        M.copy_(moved)
    else:
        M.copy_(torch.where(ok, moved, M))
        state["nonfinite"] += ~ok
    if shrink := decoupled(group):
        parameter.mul_(1 - shrink * ok.to(parameter.dtype))
    parameter.add_(M if known_true(ok) else M * ok, alpha=-group["lr"])


def coupled(group: Group) -> float:
    """τ of an L2 term τ/2 ‖θ‖² in the loss."""
    return 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]


def decoupled(group: Group) -> float:
    """Share by which parameters shrink at each step."""
    return group["lr"] * group["weight_decay"] if group["decoupled_weight_decay"] else 0.0
