"""Running means, checks and damped inverses, all without a host sync until one fails."""

import math

import torch
from torch import Tensor


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of a parameter's factors: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def free_to_read(tensor: Tensor) -> bool:
    """Whether Python may look at values without waiting for a device."""
    return tensor.device.type == "cpu"


def known_true(ok: Tensor) -> bool:
    """Whether all of `ok` is true, if that is known without a host sync; else False."""
    return free_to_read(ok) and bool(ok.all())


def known_finite(tensor: Tensor) -> bool:
    """Whether `all_finite`, if that is known without a host sync; else False."""
    return free_to_read(tensor) and math.isfinite(tensor.sum(dtype=factor_dtype(tensor)))


def all_finite(tensor: Tensor) -> Tensor:
    """Whether the sum of all entries, in float32 or better, and so each is finite; 0-d bool."""
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


def eigh(M: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [b, n], ascending, and eigenvectors, as columns, of symmetric M [b, n, n].

    They are found with one rounding of the largest entry added to the diagonal and taken off
    again: among many zeros, as units that never fire leave them, LAPACK's iteration in float32
    often fails to converge.

    Raises: torch.linalg.LinAlgError if it fails all the same, for all of M.
    """
    shift = torch.finfo(M.dtype).eps * M.diagonal(dim1=-2, dim2=-1).amax(-1, keepdim=True)
    shifted = M.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(shift)
    values, U = torch.linalg.eigh(shifted)
    return values - shift, U


def damped_inverse(M: Tensor, damping: float | Tensor) -> tuple[Tensor, Tensor]:
    """(M + damping I)⁻¹ [b, n, n] by Cholesky, and for which it worked ([b] bool).

    damping: a number, or one for each matrix, [b].

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
