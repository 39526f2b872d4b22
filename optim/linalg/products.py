"""Matrix products: symmetric ones by halves, large ones on a CPU by the faster library.

oneDNN takes half of MKL's time where that leaves AVX-512 unused (EPYC, 480 and 217 GFLOP/s).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .basics import free_to_read

PANEL = 128  # columns of a symmetric product that are made in one piece
FEW = 32  # rows below which mirroring costs more than it saves
LARGE = 2**21  # multiplications from which a call of oneDNN, 10 µs dearer, is worth it
FULL = 1e-5  # relative error of products that float32 keeps and bfloat16, 4e-3 of each, does not

USUAL = nullcontext()
CPU: Any = torch.backends.mkldnn


def product(A: Tensor, B: Tensor) -> Tensor:
    """A B [..., m, n] of stacks A [..., m, k] and B [..., k, n] of the same length.

    >>> product(torch.ones(1, 1, 2), torch.tensor([[[1.0], [2.0]]])).tolist()
    [[[3.0]]]
    """
    with faster_library(A, A.numel() * B.shape[-1]):
        return torch.bmm(A, B) if A.ndim == 3 else torch.matmul(A, B)


def sandwich(left: Tensor, M: Tensor, right: Tensor) -> Tensor:
    """The products left M right [b, m, n] of stacks [b, m, k], [b, k, l], [b, l, n]."""
    return product(product(left, M), right)


def gram_(out: Tensor, a: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Out <- beta out + alpha aᵀ a, in place; a [groups, N, n], out [groups, n, n] symmetric.

    On a CPU a large one is made in panels of columns down to the diagonal, whose rest is mirrored:
    little more than half of the arithmetic (PyTorch has no symmetric product). A GPU prefers one
    call.
    """
    with faster_library(a, a.numel() * a.shape[2]):
        if a.shape[2] <= PANEL or a.shape[1] < FEW or not free_to_read(a):
            return out.baddbmm_(a.mT, a, beta=beta, alpha=alpha)
        for one, x in zip(out, a, strict=True):
            for start in range(0, len(one), PANEL):
                end = min(start + PANEL, len(one))
                one[:end, start:end].addmm_(x[:, :end].T, x[:, start:end], beta=beta, alpha=alpha)
                if start:
                    one[start:end, :start] = one[:start, start:end].T
    return out


def second_moment(mean: Tensor | None, a: Tensor, seen: int, *, ones: bool) -> Tensor:
    """Mean over rows of ã ãᵀ with ã = [a; 1] (or a), joined to that of `seen` earlier rows.

    a [groups, N, in] -> [groups, in+1, in+1] with `ones`, else [groups, in, in]. The 1 is never
    appended to a: the product goes straight into the corner and the border holds the mean.
    """
    groups, count, size = a.shape
    total, first = seen + count, mean is None
    if mean is None:
        mean = a.new_empty(groups, size + ones, size + ones)
    # beta=0 does not read the empty memory
    gram_(mean[:, :size, :size], a, beta=0 if first else seen / total, alpha=1 / total)
    if ones:
        border = a.mean(1)
        if not first:
            border = mean[:, :size, size].lerp(border, count / total)
        mean[:, :size, size] = mean[:, size, :size] = border
        mean[:, size, size] = 1.0
    return mean


def faster_library(like: Tensor, multiplications: int) -> AbstractContextManager[None]:
    """Inside, products of so many multiplications are made by the faster library."""
    if multiplications < LARGE or like.dtype != torch.float32 or not free_to_read(like):
        return USUAL
    return allowed(CPU.matmul, "bf16") if onednn_is_faster() else USUAL


@contextmanager
def allowed(operations: Any, precision: str) -> Iterator[None]:
    """Inside, PyTorch may use this precision within such operations on float32 numbers.

    operations: CPU.matmul or CPU.conv.  precision: "ieee" is float32 itself.
    """
    before = operations.fp32_precision
    operations.fp32_precision = precision
    try:
        yield
    finally:
        operations.fp32_precision = before


@cache
def onednn_is_faster() -> bool:
    """Whether this processor has AVX-512, is not Intel's, and float32 is kept by oneDNN.

    PyTorch turns to oneDNN where products may be made in bfloat16. Without units for it (AMX)
    they are made in float32 all the same, which is tried before it is believed.
    """
    has = torch.cpu.get_capabilities()
    wide = has.get("avx512_f", False) and "intel" not in has.get("cpu_name", "").lower()
    if not wide or not torch.backends.mkldnn.is_available():
        return False
    with torch.autocast("cpu", enabled=False), allowed(CPU.matmul, "bf16"):
        return keeps_float32(torch.mm)


def keeps_float32(multiply: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether products of float32 matrices [256, 256] come out to `FULL`.

    >>> keeps_float32(lambda A, B: (A.bfloat16() @ B.bfloat16()).float())
    False
    """
    own = torch.Generator().manual_seed(0)
    A, B = (torch.randn(256, 256, generator=own, dtype=torch.float32) for _ in range(2))
    exact = A.double() @ B.double()
    error = torch.linalg.matrix_norm(multiply(A, B) - exact)
    return bool(error < FULL * torch.linalg.matrix_norm(exact))
