"""Layer inputs and output gradients of single examples, whose V_n = Σ_t g_nt ã_ntᵀ are squared.

Calls of a layer in one forward are further positions of its examples; other forwards have others.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..blocks.blocks import Block
from . import positions
from .capture import Accumulate, Call, Totals, once


class Rows(NamedTuple):
    """Input and output gradient of one call as they came: patches are made when needed."""

    forward: int
    x: Tensor
    g: Tensor


def sampled_examples(totals: Totals, call: Call, _: Tensor) -> None:
    """Keep the rows of labels drawn from the model."""
    if not call.counted:
        assert call.g is not None
        totals.kept.append(Rows(call.forward, call.kept(), call.g))


def empirical_examples(totals: Totals, call: Call, delivered: Tensor) -> None:
    """Keep the rows of the data's labels, scaled as backward delivers them."""
    once(call)
    totals.kept.append(Rows(call.forward, call.kept(), delivered))


def examples_of(likelihood: str) -> Accumulate:
    """Which of the two: by the data's labels for "empirical", else by sampled ones."""
    return empirical_examples if likelihood == "empirical" else sampled_examples


def mean_weight(totals: Totals, scale: float | None) -> float:
    """What makes a sum of squares of V_n their mean over the m examples of all micro-batches.

    scale: what the loss of the data's labels was multiplied with, its mean delivers scale g_n / m;
    None for sampled labels, whose g_n are whole. With a part of the examples in each of several
    processes the sums over the parts add up to the mean.
    """
    m = totals.examples
    return 1 / m if scale is None else m * (totals.share / scale) ** 2


def pieces(block: Block, totals: Totals) -> Iterator[tuple[Tensor, Tensor]]:
    """ã [groups, p, T, in+1] and g [groups, p, T, out], so few at a time that p V_n stay small.

    Raises: ValueError if calls in one forward saw batches of different sizes.
    """
    forwards: dict[int, list[Rows]] = {}
    for rows in totals.kept:
        forwards.setdefault(rows.forward, []).append(rows)
    for calls in forwards.values():
        sizes = {len(call.x) for call in calls}
        if len(sizes) > 1:
            raise ValueError(
                f"layer '{block.name}' was called on batches of {sorted(sizes)} examples in one "
                "forward; gradients of single examples need the same examples in every call"
            )
        m = sizes.pop()
        count = max(1, positions.PIECE // _entries(block, calls))
        for start in range(0, m, count):
            yield _joined(block, calls, slice(start, start + count))


def _entries(block: Block, calls: list[Rows]) -> int:
    """Numbers to hold for each example: its rows and, with several of them, its V."""
    out, columns = block.shape
    rows = sum(call.g[0].numel() for call in calls) // block.weight.shape[0]
    return block.groups * (rows * (out + columns) + (rows > 1) * out * columns)


def _joined(block: Block, calls: list[Rows], part: slice) -> tuple[Tensor, Tensor]:
    """ã and g of some examples, positions of all calls side by side."""
    a = torch.cat([positions.inputs(block, call.x[part]) for call in calls], 2)
    g = torch.cat([positions.gradients(block, call.g[part]) for call in calls], 2)
    return a if block.bias is None else pad(a, (0, 1), value=1.0), g
