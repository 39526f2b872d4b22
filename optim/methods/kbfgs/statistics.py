"""Batch statistics of K-BFGS: second moments of inputs, means of z, g and x̃."""

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture import positions
from ...capture.capture import Call, Totals
from ...core import distributed
from ...core.kronecker_factors import add_input_moment, input_factor, input_moment
from ...core.stacks import Stack
from ...linalg.basics import running_mean


def first(totals: Totals, call: Call, delivered: Tensor) -> None:
    """First pass: the second moment of the inputs, and the means of `second`.

    A convolution keeps its inputs instead, for the Hessian action of this batch.
    """
    if not call.counted:
        block, new = call.block, positions.row_mean(call.block, call.x)
        totals.means["x"] = running_mean(totals.means.get("x"), new, call.rows, totals.rows)
        if block.convolutional:
            totals.kept.append(call.kept())
        else:
            add_input_moment(totals, call)
    second(totals, call, delivered)


def second(totals: Totals, call: Call, delivered: Tensor) -> None:
    """Mean pre-activation z̄ [groups, out] and the summed gradient, as delivered.

    The rows delivered under a mean loss are g_n / m, so their sum is m times the mean over m.
    """
    if not call.counted:
        assert call.z is not None
        z = call.z.reshape(call.block.groups, -1)
        totals.means["z"] = running_mean(totals.means.get("z"), z, call.rows, totals.rows)
    summed = (
        delivered.sum((0, 2, 3)) if call.block.convolutional else delivered.flatten(0, -2).sum(0)
    )
    g = summed.reshape(call.block.groups, -1)
    totals.means["g"] = totals.means["g"] + g if "g" in totals.means else g


def moment(totals: Totals, call: Call, _: Tensor) -> None:
    """The second moment of the inputs alone, for the first pass over the data."""
    add_input_moment(totals, call)


def input_factors(stack: Stack, totals: dict[Block, Totals]) -> Tensor:
    """A = E_n[Σ_t ã ãᵀ] of the batch, [size, in+1, in+1]; of kept inputs if need be."""
    for block, total in totals.items():
        seen = 0
        for x in total.kept if block.convolutional and "A" not in total.means else ():
            A = total.means.get("A")
            total.means["A"], seen = input_moment(A, block, x, seen=seen)
        if seen:  # of the rows of all processes
            distributed.add_up_(total.means["A"].mul_(seen / total.rows))
    return stack.gathered({block: input_factor(total) for block, total in totals.items()})


def point(stack: Stack, totals: dict[Block, Totals]) -> tuple[Tensor, Tensor]:
    """z̄ and ḡ [size, out], means over examples and positions, g of the per-example loss."""
    z = stack.gathered({block: total.means["z"] for block, total in totals.items()})
    g = stack.gathered({b: total.means["g"] / total.positions for b, total in totals.items()})
    return z, g


def patch_moments(stack: Stack, totals: dict[Block, Totals], s: Tensor) -> Tensor:
    """E_n[Σ_t ã (ã · s)] of the batch for s [size, in+1], its A never formed."""
    parts = {}
    for block, total in totals.items():
        own = s[stack.places[block]]
        acted = [positions.patch_action(block, x, own) for x in total.kept]
        parts[block] = torch.stack(acted).sum(0) / total.examples
        distributed.add_up_(parts[block])
    return stack.gathered(parts)
