"""Which dtype and device an operator computes in."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diag.operators.structures import Operator


def like(operator: Operator) -> Tensor:
    """Return an empty tensor [0] with the dtype and device of `operator`, for `v.to(like(C))`.

    They are those of the operator itself where it has `.dtype` and `.device`, else those of the
    first floating-point tensor it holds, directly, in a sequence or in an operator it wraps.

    Raises: TypeError when it holds none.

    >>> from diag.operators.structures import Damped, Diagonal
    >>> like(Damped(Diagonal(torch.ones(3, dtype=torch.float32)), 0.1)).dtype
    torch.float32
    """
    found = _find(operator)
    if found is None:
        raise TypeError(
            f"the dtype and device of {type(operator).__name__} are unknown: it holds no "
            f"floating-point tensor; give it the attributes .dtype and .device"
        )
    return found


def _find(thing: Any) -> Tensor | None:
    dtype, device = getattr(thing, "dtype", None), getattr(thing, "device", None)
    if isinstance(dtype, torch.dtype) and device is not None:
        return torch.empty(0, dtype=dtype, device=device) if dtype.is_floating_point else None
    if isinstance(thing, Operator):
        parts: Sequence[Any] = list(getattr(thing, "__dict__", {}).values())
    elif isinstance(thing, list | tuple):
        parts = thing
    else:
        return None
    return next((found for part in parts if (found := _find(part)) is not None), None)
