"""The formulas of EKFAC: eigenvectors, squared gradients in the eigenbasis, change of basis."""

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture.capture import Accumulate, Call, Totals
from ...capture.per_example import examples_of, mean_weight, pieces
from ...core import distributed
from ...core.kronecker_factors import factors_of
from ...core.stacks import Stack
from ...linalg.basics import eigh, finite, learn_, per
from ...linalg.products import product, sandwich

NEGATIVE = 1e-3  # eigenvalues below -NEGATIVE times the largest are no rounding


def eigenvectors(M: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvectors of M [b, n, n] as columns, and for which it worked ([b] bool).

    A mean of squares has no eigenvalue clearly below zero: such an M is broken and refused.

    By hand, up to signs:
        >>> U, ok = eigenvectors(torch.diag(torch.tensor([1.0, 2.0]))[None], torch.zeros(1))
        >>> U[0].abs().tolist(), bool(ok)
        ([[1.0, 0.0], [0.0, 1.0]], True)
    """
    ok = finite(M)
    safe = torch.where(per(ok, M) > 0, M, torch.eye(M.shape[-1], dtype=M.dtype, device=M.device))
    try:
        # on CUDA this waits for the device, whose verdict PyTorch reads: on refresh steps only
        values, U = eigh(safe)
    except torch.linalg.LinAlgError:
        if len(M) == 1:
            return torch.zeros_like(M), torch.zeros_like(ok)
        parts = [eigenvectors(one[None], _) for one in M]
        return torch.cat([U for U, _ in parts]), torch.cat([good for _, good in parts])
    return U, ok & finite(U) & (values[:, 0] >= -NEGATIVE * values[:, -1])


def rotated(x: Tensor, U: Tensor) -> Tensor:
    """Rows x [groups, p, T, n] times U [groups, n, n]."""
    return product(x.flatten(1, 2), U).unflatten(1, x.shape[1:3])


def squares(a: Tensor, g: Tensor, U_A: Tensor, U_G: Tensor) -> Tensor:
    """Σ_n (U_Gᵀ V_n U_A)² entry by entry [groups, out, in+1], V_n = Σ_t g_nt ã_ntᵀ.

    One position: ((g U_G)²)ᵀ (ã U_A)², no V_n is formed. With more, each side is turned in its
    rows or in V_n, whichever are fewer.
    """
    positions, columns, out = a.shape[2], a.shape[3], g.shape[3]
    early_a, early_g = positions <= out, positions <= columns
    a = rotated(a, U_A) if early_a else a
    g = rotated(g, U_G) if early_g else g
    if positions == 1:
        return product(g[:, :, 0].square().mT, a[:, :, 0].square())
    V = product(g.mT, a)
    V = V if early_a else rotated(V, U_A)
    V = V if early_g else rotated(V.mT, U_G).mT
    return V.square_().sum(1)


def overlap(old: Tensor, new: Tensor) -> Tensor:
    """(new_iᵀ old_j)², [b, n, n]: what a value on old_j contributes to the one on new_i.

    The identity where nothing has changed, so that values at rest do not drift by rounding.
    """
    eye = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
    same = (old == new).flatten(1).all(1)
    return torch.where(same[:, None, None], eye, product(new.mT, old).square_())


def carry_rows_(S: Tensor, old: Tensor, new: Tensor, place: slice = slice(None)) -> None:
    """S [b, out, in+1] <- diagonal of U diag(S) Uᵀ in the basis with the new U_G for the old.

    place: which of the b the old and new are of.
    """
    S[place] = product(overlap(old, new), S[place])


def carry_columns_(S: Tensor, old: Tensor, new: Tensor, place: slice = slice(None)) -> None:
    """As above, for U_A."""
    S[place] = product(S[place], overlap(old, new).mT)


def values_between(M: Tensor, U: Tensor) -> Tensor:
    """Diagonal of Uᵀ M U, [b, n]: eigenvalues, if the columns of U are eigenvectors."""
    return product(M, U).mul_(U).sum(-2)


def scaled(M: Tensor, U_G: Tensor, U_A: Tensor, values: Tensor) -> Tensor:
    """U_G [(U_Gᵀ M U_A) ∘ values] U_Aᵀ, for M and values [b, out, in+1]."""
    return sandwich(U_G, sandwich(U_G.mT, M, U_A).mul_(values), U_A.mT)


def factors_and_examples_of(likelihood: str) -> Accumulate:
    """KFAC's statistics, and the rows of every example."""
    factors, examples = factors_of(likelihood), examples_of(likelihood)

    def accumulate(totals: Totals, call: Call, delivered: Tensor) -> None:
        factors(totals, call, delivered)
        examples(totals, call, delivered)

    return accumulate


def learn_scalings(
    stack: Stack, totals: dict[Block, Totals], scale: float | None, decay: float, ok: Tensor
) -> Tensor:
    """S <- decay S + (1 - decay) E_n[(U_Gᵀ V_n U_A)²] where ok and finite; where that was."""
    found = {}
    for block, total in totals.items():
        U_A, U_G = stack.of(block, "U_A"), stack.of(block, "U_G")
        summed = torch.zeros_like(stack.of(block, "S"))
        for a, g in pieces(block, total):
            summed += squares(a, g, U_A, U_G)
        found[block] = summed.mul_(mean_weight(total, scale))
        distributed.add_up_(summed)
    return _learn(stack, stack.gathered(found), 1 - decay, ok)


def learn_from_gradient(
    stack: Stack, totals: dict[Block, Totals], G: Tensor, decay: float, ok: Tensor
) -> Tensor:
    """S <- decay S + (1 - decay) m (U_Gᵀ ∇ U_A)² for ∇ of m examples, where ok and finite.

    G: ∇ [size, out, in+1], of the mean loss. In expectation E_n[(U_Gᵀ V_n U_A)²] where examples
    are independent and their mean is near zero ("EKFAC-ra", arXiv:1806.03884).
    Returns: where that was, [size] bool.
    """
    m = stack.zeros()
    for block, total in totals.items():
        m[stack.places[block]] = total.examples
    S = sandwich(stack["U_G"].mT, G, stack["U_A"]).square_().mul_(m[:, None, None])
    return _learn(stack, S, 1 - decay, ok)


def _learn(stack: Stack, S: Tensor, weight: float, ok: Tensor) -> Tensor:
    ok = ok & finite(S)
    learn_(stack["S"], S, weight, ok)
    return ok
