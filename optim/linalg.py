"""Running means, second moments and damped inverses, all without a host sync until one fails."""

import math

import torch
from torch import Tensor

PANEL = 128  # columns of a symmetric product that are made in one piece
FEW = 32  # rows below which mirroring costs more than it saves
ALIGNED = 16  # entries: rows of matrices that start at multiples of 64 bytes multiply faster


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of a parameter's factors: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def free_to_read(tensor: Tensor) -> bool:
    """Whether Python may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def known_true(ok: Tensor) -> bool:
    """Whether all of `ok` is true, if that can be known for nothing; else False."""
    return free_to_read(ok) and bool(ok.all())


def known_finite(tensor: Tensor) -> bool:
    """Whether `all_finite`, if that can be known for nothing; else False."""
    return free_to_read(tensor) and math.isfinite(tensor.sum(dtype=factor_dtype(tensor)))


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no entry is NaN or infinite, as a 0-d bool tensor, in one pass.

    A sum is finite only if its terms are; one that overflows counts as not finite. It is made in
    float32 at least, where sums of finite half-precision numbers do not overflow.
    """
    return is_finite(tensor.sum(dtype=factor_dtype(tensor)))


def is_finite(x: Tensor) -> Tensor:
    """Entry by entry, [...] bool; torch.isfinite takes twice as many kernels."""
    return (x - x) == 0


def finite(stacked: Tensor) -> Tensor:
    """Which matrices or vectors of a stack [b, ...] are finite throughout, [b] bool."""
    return is_finite(stacked.sum(tuple(range(1, stacked.ndim))))  # no copy of strided ones


def finite_moments(mask: Tensor, *moments: Tensor) -> Tensor:
    """Whose second moments [b, n, n] are all finite, among mask [b] bool; it where known to be.

    Their diagonals tell: no entry is larger than the largest of those.

    The second of two is not:
        >>> M = torch.eye(2).repeat(2, 1, 1)
        >>> M[1, 0, 0] = torch.inf
        >>> finite_moments(torch.tensor([True, True]), M).tolist()
        [True, False]
    """
    diagonals = [M.diagonal(dim1=-2, dim2=-1) for M in moments]
    if all(known_finite(d) for d in diagonals):
        return mask
    return torch.stack([mask, *map(finite, diagonals)]).all(0)


def per(ok: Tensor, like: Tensor) -> Tensor:
    """A value for each matrix [b] in the shape and precision to multiply a stack [b, ...]."""
    return ok.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def learn_(average: Tensor, new: Tensor, weight: float | Tensor, ok: Tensor) -> None:
    """Average <- (1 - weight) average + weight new, where ok [b]; stacks [b, ...]; spoils new.

    weight: a number, or one for each, [b].
    """
    if isinstance(weight, Tensor):
        weight = per(weight, average)
    if known_true(ok):
        average.lerp_(new, weight)
    else:
        # a zero weight does not silence a NaN; nan_to_num is six times faster than where on a CPU
        average.lerp_(new.nan_to_num_(0.0, 0.0, 0.0), per(ok, average) * weight)


def running_mean(mean: Tensor | None, new: Tensor, count: int, seen: int) -> Tensor:
    """The mean of `count` rows joined to that of `seen` earlier ones."""
    return new if mean is None else mean.lerp_(new, count / (seen + count))


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


def gram_(out: Tensor, a: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Out <- beta out + alpha aᵀ a, in place; a [groups, N, n], out [groups, n, n] symmetric.

    On a CPU a large one is made in panels of columns down to the diagonal, whose rest is mirrored:
    little more than half of the arithmetic (PyTorch has no symmetric product). A GPU prefers one
    call.
    """
    if a.shape[2] <= PANEL or a.shape[1] < FEW or not free_to_read(a):
        return out.baddbmm_(a.mT, a, beta=beta, alpha=alpha)
    for one, x in zip(out, a, strict=True):
        for start in range(0, len(one), PANEL):
            end = min(start + PANEL, len(one))
            one[:end, start:end].addmm_(x[:, :end].T, x[:, start:end], beta=beta, alpha=alpha)
            if start:
                one[start:end, :start] = one[:start, start:end].T
    return out


def sandwich(left: Tensor, M: Tensor, right: Tensor) -> Tensor:
    """The products left M right [b, out, in] of stacks [b, out, out], [b, out, in], [b, in, in]."""
    return torch.bmm(torch.bmm(left, M, out=aligned(M)), right, out=aligned(M))


def aligned(like: Tensor) -> Tensor:
    """Empty memory of the same shape, its rows `ALIGNED`: a CPU's product is up to a fifth faster.

    Between the rows there are gaps: never part of a state, which is contiguous when loaded.
    """
    *many, n = like.shape
    return like.new_empty(*many, _rounded_up(n))[..., :n]


def _rounded_up(n: int) -> int:
    return -(-n // ALIGNED) * ALIGNED


def damped_inverse(M: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """(M + damping I)⁻¹ [b, n, n] by Cholesky, and for which it worked ([b] bool).

    damping: a number, or one for each matrix, [b].

    Known by hand:
        >>> inverse, ok = damped_inverse(torch.eye(2)[None], 3.0)
        >>> inverse[0].diagonal().tolist(), bool(ok)
        ([0.25, 0.25], True)
    """
    damped = M.clone()
    shift = damping[:, None] if isinstance(damping, Tensor) else damping
    damped.diagonal(dim1=-2, dim2=-1).add_(shift)
    L, info = torch.linalg.cholesky_ex(damped)
    # where it failed the diagonal may hold a zero, at which cholesky_inverse would raise
    L.diagonal(dim1=-2, dim2=-1).masked_fill_((info != 0)[:, None], 1.0)
    inverse = torch.cholesky_inverse(L)
    return inverse, (info == 0) & finite(inverse)
