"""Memory for large results."""

import numpy as np
import torch
from torch import Tensor


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised tensor with the dtype and device of `like`.

    On a CPU it comes from NumPy, which asks Linux for large pages: touching fresh memory in small
    pages takes four times as long as writing it, and a dense block is written once.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    dtype = torch.empty(0, dtype=like.dtype).numpy().dtype
    return torch.from_numpy(np.empty(shape, dtype))
