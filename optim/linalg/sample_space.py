"""Algebra of F = Σ_n vec V_n (vec V_n)ᵀ by its Gram matrix over examples, F never formed.

V_n = Σ_t g_nt x̃_ntᵀ [out, in+1], kept as its rows g [s, m, T, out], x [s, m, T, in+1].
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .basics import finite
from .products import faster_library, gram_, product

PIECE = 2**24  # entries of the V_n held at once


def padded(rows: Tensor, m: int, T: int) -> Tensor:
    """[s, m, T, n] with zero rows appended, which give nothing."""
    more = m - rows.shape[1], T - rows.shape[2]
    return pad(rows, (0, 0, 0, more[1], 0, more[0])) if any(more) else rows


def compressed(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the same V_n, at most min(out, in+1) of them: the identity and V_n itself.

    Three positions of a layer with one output:
        >>> g, x = compressed(torch.ones(1, 1, 3, 1), torch.eye(3)[None, None])
        >>> g.tolist(), x.tolist()
        ([[[[1.0]]]], [[[[1.0, 1.0, 1.0]]]])
    """
    (*sm, T, out), size = g.shape, x.shape[-1]
    if min(out, size) >= T:
        return g, x
    n, V = min(out, size), product(g.mT, x)
    eye = torch.eye(n, dtype=x.dtype, device=x.device).expand(*sm, n, n)
    return (eye, V) if out == n else (V.mT, eye)


def gram(g: Tensor, x: Tensor) -> Tensor:
    """K_nk = ⟨V_n, V_k⟩, [s, m, m].

    With one row per example (x xᵀ) ∘ (g gᵀ); with few, its sum over pairs of positions; with many,
    products of the V_n, which are made in pieces.
    """
    (s, m, T, out), size = g.shape, x.shape[-1]
    if T == 1 and s * m * m <= PIECE:
        K, other = x.new_empty(s, m, m), x.new_empty(s, m, m)
        gram_(K, x[:, :, 0].mT, beta=0.0, alpha=1.0)
        return K.mul_(gram_(other, g[:, :, 0].mT, beta=0.0, alpha=1.0))
    if T == 1 or T * T * (out + size) <= out * size:
        at_once = max(1, PIECE // (s * m * T * T))
        return torch.cat([_products(g, x, n, at_once) for n in range(0, m, at_once)], 1)
    K = x.new_zeros(s, m, m)
    for part in g.split(max(1, PIECE // (s * m * size)), -1):
        gram_(K, product(part.mT, x).flatten(2).mT, beta=1.0, alpha=1.0)
    return K


def _products(g: Tensor, x: Tensor, n: int, count: int) -> Tensor:
    """`count` rows of the Gram matrix from number n on: Σ_t Σ_u (x_nt · x_ku) (g_nt · g_ku)."""
    m, T = g.shape[1:3]
    K = product(x[:, n : n + count].flatten(1, 2), x.flatten(1, 2).mT)
    K.mul_(product(g[:, n : n + count].flatten(1, 2), g.flatten(1, 2).mT))
    return K if T == 1 else K.unflatten(2, (m, T)).unflatten(1, (-1, T)).sum((2, 4))


def projected(g: Tensor, x: Tensor, M: Tensor) -> Tensor:
    """t_n = ⟨V_n, M⟩ [s, m] = Σ_t g_ntᵀ M x̃_nt, for M [s, out, in+1]."""
    a, b = x.flatten(1, 2), g.flatten(1, 2)
    wide = M.shape[1] <= M.shape[2]
    t = (product(a, M.mT).mul_(b) if wide else product(b, M).mul_(a)).sum(-1)
    return t.unflatten(1, g.shape[1:3]).sum(-1)


def add_combination_(M: Tensor, g: Tensor, x: Tensor, weights: Tensor) -> Tensor:
    """M + Σ_n weights_n V_n, in place; M [s, out, in+1], weights [s, m]."""
    weighted = (g * weights[..., None, None]).flatten(1, 2)
    with faster_library(M, weighted.numel() * M.shape[2]):
        return M.baddbmm_(weighted.mT, x.flatten(1, 2))


def damped_cholesky(K: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """L with L Lᵀ = K + damping I, [b, m, m], and for which it worked; damping [b]."""
    shifted = K.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(damping[:, None])
    L, info = torch.linalg.cholesky_ex(shifted)
    return L, (info == 0) & finite(L)


def solved(L: Tensor, t: Tensor) -> Tensor:
    """(L Lᵀ)⁻¹ t, [s, m]."""
    return torch.cholesky_solve(t[..., None], L)[..., 0]
