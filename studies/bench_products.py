"""Arithmetic of matrix products, those in place among them, which PyTorch's counter leaves out."""

from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode


def counter() -> FlopCounterMode:
    """A context that counts floating-point operations of products: `get_total_flops()`.

    A product in place of [2, 3] and [3, 4], 2 · 2 · 3 · 4:
        >>> with counter() as count:
        ...     _ = torch.zeros(2, 4).addmm_(torch.ones(2, 3), torch.ones(3, 4))
        >>> count.get_total_flops()
        48
    """
    into = {torch.ops.aten.addmm_: _into, torch.ops.aten.baddbmm_: _into}
    return FlopCounterMode(display=False, custom_mapping=into)


def _into(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    """2 · ... · n · m · k of [..., n, m] and [..., m, k]."""
    return 2 * prod(left) * right[-1]
