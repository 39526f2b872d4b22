"""Running means, second moments and damped inverses, all without a host sync until one fails."""

import torch
from torch import Tensor

STRIPS = 4  # of a symmetric product on a CPU
SMALL = 256  # columns below which it is made in one piece


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """Precision of a parameter's factors: float64 for float64, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def all_finite(tensor: Tensor) -> Tensor:
    """Whether no entry is NaN or infinite, as a 0-d bool tensor, in one pass.

    A sum is finite only if its terms are; one that overflows counts as not finite.
    """
    return torch.isfinite(tensor.sum())


def lerp_if_(average: Tensor, new: Tensor, weight: float, ok: Tensor) -> None:
    """Average <- (1 - weight) average + weight new where ok (0-d bool), else unchanged.

    `new` must be finite: a zero weight does not silence a NaN.
    """
    average.lerp_(new, ok.to(average.dtype) * weight)


def running_mean(mean: Tensor | None, x: Tensor, seen: int, *, ones: bool) -> Tensor:
    """Mean over rows of [x, 1] (or of x), joined to the mean of `seen` earlier rows.

    x [m, in] -> [in+1] with `ones`, else [in].
    """
    rows = x.mean(0)
    new = torch.cat([rows, rows.new_ones(1)]) if ones else rows
    return new if mean is None else mean.lerp_(new, len(x) / (seen + len(x)))


def second_moment(mean: Tensor | None, x: Tensor, seen: int, *, ones: bool) -> Tensor:
    """Mean over rows of a aᵀ with a = [x; 1] (or x), joined to that of `seen` earlier rows.

    x [m, in] -> [in+1, in+1] with `ones`, else [in, in]. The 1 is never appended to x: the
    product goes straight into the corner of the result and the border holds the plain mean.
    """
    size, total = x.shape[1], seen + len(x)
    first = mean is None
    if mean is None:
        mean = x.new_empty(size + ones, size + ones)
    # beta=0 does not read the empty memory
    gram_(mean[:size, :size], x, beta=0 if first else seen / total, alpha=1 / total)
    if ones:
        border = running_mean(None if first else mean[:, size].clone(), x, seen, ones=True)
        mean[:, size] = border
        mean[size, :] = border
    return mean


def gram_(out: Tensor, x: Tensor, *, beta: float, alpha: float) -> Tensor:
    """Out <- beta out + alpha xᵀ x, in place, x [m, n], out [n, n] symmetric.

    On a CPU a large one is made strip by strip up to the diagonal and mirrored: 5/8 of the
    arithmetic (PyTorch has no symmetric product). A GPU prefers one call.
    """
    size = x.shape[1]
    rows = size if size < SMALL or x.device.type != "cpu" else -(-size // STRIPS)
    for start in range(0, size, rows):
        stop = min(start + rows, size)
        strip = out[start:stop, :stop]
        strip.addmm_(x[:, start:stop].T, x[:, :stop], beta=beta, alpha=alpha)
        out[:start, start:stop] = strip[:, :start].T
    return out


def damped_inverse(M: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """(M + damping I)⁻¹ [n, n] by Cholesky, and whether it worked (0-d bool tensor).

    Known by hand:
        >>> inverse, ok = damped_inverse(torch.eye(2), 3.0)
        >>> inverse.diagonal().tolist(), bool(ok)
        ([0.25, 0.25], True)
    """
    damped = M.clone()
    damped.diagonal().add_(damping)
    L, info = torch.linalg.cholesky_ex(damped)
    inverse = torch.cholesky_inverse(L)
    return inverse, (info == 0) & all_finite(inverse)


def damped_inverses(matrices: list[Tensor], damping: float) -> list[Tensor | None]:
    """(M + damping I)⁻¹ of each matrix; a failure is tried again in float64, then None.

    Waits for the device once, however many matrices: call it on refresh steps only.
    """
    if not matrices:
        return []
    tried = [damped_inverse(M, damping) for M in matrices]
    worked = torch.stack([ok for _, ok in tried]).tolist()
    results: list[Tensor | None] = []
    for M, (inverse, _), ok in zip(matrices, tried, worked, strict=True):
        results.append(inverse if ok else _inverse_in_float64(M, damping))
    return results


def _inverse_in_float64(M: Tensor, damping: float) -> Tensor | None:
    inverse, ok = damped_inverse(M.double(), damping)
    return inverse.to(M.dtype) if ok else None
