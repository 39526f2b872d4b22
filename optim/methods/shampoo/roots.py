"""Inverse p-th roots of stacks of positive semi-definite matrices."""

from math import ceil, log

import torch
from torch import Tensor

from ...linalg.basics import eigh, finite, free_to_read, known_true, per
from ...linalg.products import gram_

INDEFINITE = 1e-3  # share of the largest eigenvalue; what is more negative is not rounding
TOLERANCE, GROWTH, LIMIT = 1e-6, 1.2, 100  # of the published iteration
ACCEPTED = 1e-3  # error of a root that is still used; float32 does not always reach TOLERANCE


def inverse_root(M: Tensor, damping: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """(M + damping I)^(-1/p) [b, n, n], and for which it worked ([b] bool); damping [b].

    By eigenvalues on a CPU; on a device by products alone, without waiting for it.

    The fourth root of 16:
        >>> root, ok = inverse_root(15 * torch.eye(2)[None], torch.ones(1), 4)
        >>> root[0].diagonal().round(decimals=6).tolist(), bool(ok)
        ([0.5, 0.5], True)
    """
    return (eigen_root if free_to_read(M) else newton_root)(M, damping, p)


def eigen_root(M: Tensor, damping: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Inverse p-th roots by eigenvalues; those negative from rounding count as zero.

    A matrix with an eigenvalue below -`INDEFINITE` of the largest is refused.
    """
    good = finite(M)
    if not known_true(good):
        M = M.nan_to_num(0.0, 0.0, 0.0) * per(good, M)  # eigh raises at a NaN
    values, U, solved = _eigh(M)
    good = good & solved & (values[:, 0] >= -INDEFINITE * values.abs().amax(1))
    halves = (values.clamp_min(0.0) + damping[:, None]) ** (-0.5 / p)
    root = gram_(torch.empty_like(M), (U * halves[:, None]).mT, beta=0.0, alpha=1.0)
    return root, good & finite(root)


def newton_root(M: Tensor, damping: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """Inverse p-th roots by the coupled Newton iteration, without reading values on a GPU.

    T = ((p+1) I - N) / p,  N <- Tᵖ N,  X <- X T,  from N = z (M + damping I), X = z^(1/p) I with
    z = (1+p) / (2 ‖M + damping I‖_F), until N = I to `TOLERANCE` or the error grows. Members
    that are done stay as they are while others go on.
    Source: Guo, Higham 2006; as in the published code of arXiv:2106.02925.
    """
    eye = torch.eye(M.shape[-1], dtype=M.dtype, device=M.device)
    N = M + damping[:, None, None] * eye
    z = (1 + p) / (2 * torch.linalg.matrix_norm(N))
    N, X = z[:, None, None] * N, (z ** (1 / p))[:, None, None] * eye
    error = (N - eye).abs().amax((1, 2))
    going = torch.isfinite(error)
    for _ in range(_enough(len(eye), p, M.dtype)):
        T = ((p + 1) * eye - N) / p
        following = torch.linalg.matrix_power(T, p) @ N
        reached = (following - eye).abs().amax((1, 2))
        going = going & (reached <= GROWTH * error)  # also stops a NaN
        N = torch.where(going[:, None, None], following, N)
        X = torch.where(going[:, None, None], X @ T, X)
        error = torch.where(going, reached, error)
        going = going & (error > TOLERANCE)
        if known_true(~going):
            break
    return X, (error < ACCEPTED) & finite(X)


def root(M: Tensor, p: int) -> Tensor:
    """M^(1/p) [b, n, n]; eigenvalues of the size of rounding count as zero."""
    values, U = eigh(M)
    rounding = M.shape[-1] * torch.finfo(M.dtype).eps * values[:, -1:]
    powers = torch.where(values > rounding, values, 0.0) ** (1 / p)
    return (U * powers[:, None]) @ U.mT


def _eigh(M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues [b, n] ascending, eigenvectors [b, n, n], and for which they were found."""
    try:
        values, U = eigh(M)
    except torch.linalg.LinAlgError:
        if len(M) > 1:
            each = zip(*[_eigh(one[None]) for one in M], strict=True)
            values, U, found = (torch.cat(part) for part in each)
            return values, U, found
        return M[:, 0], M, M.new_zeros(1, dtype=torch.bool)
    return values, U, M.new_ones(len(M), dtype=torch.bool)


def _enough(n: int, p: int, dtype: torch.dtype) -> int:
    # the least eigenvalue, >= 1 / (√n condition), grows by ((p+1)/p)ᵖ; near 1 the digits double
    start = torch.finfo(dtype).eps / n**0.5
    return min(LIMIT, ceil(-log(start) / (p * log(1 + 1 / p))) + 10)
