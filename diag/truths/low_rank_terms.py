"""Low-rank terms: the exact GGN or Fisher of any block as a mean over examples of V_n V_nᵀ.

V_n [d, k] has as many columns as the loss has directions of curvature at the outputs. The form
suits shared weights, groups of layers, embeddings and norms.
"""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ..backward.positions import Positions
from ..operators import (
    BlockDiagonal,
    Damped,
    Dense,
    Diagonal,
    Kronecker,
    KroneckerSum,
    LowRank,
    Operator,
    diagonal,
    inner_rule,
    keep,
)
from ..operators.batched import squared_blocks
from ..operators.dtypes import conversion, convert, made_of
from ..operators.eigen import KroneckerEigen, Spectral
from ..operators.forms import to_dense
from ..operators.structures import square
from .kronecker_terms import KroneckerTerms
from .per_example import PerExampleTerms, mean_inner

AT_ONCE = 2**24  # floats of columns another operator is applied to at a time


class LowRankTerms(PerExampleTerms):
    """Operator (1/N) Σ_n Σ_k V_nk V_nkᵀ with V [N, k, d].

    positions: returns the layer's a_nt and b_nkt, V_nk = Σ_t b_nkt a_ntᵀ; the Gram matrix then
    takes the cheaper way. factor_sizes: (o, i) of a block that is one matrix [W, b].
    """

    def __init__(
        self,
        V: Tensor,
        positions: Callable[[], Positions] | None = None,
        factor_sizes: tuple[int, int] | None = None,
    ) -> None:
        self.V = V
        self.positions = positions
        self.factor_sizes = factor_sizes
        self.kept = {}

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.V)

    shape = square(lambda self: self.V.shape[2])

    @property
    def columns(self) -> Tensor:
        """F [N·k, d] with C = FᵀF."""
        return self.V.flatten(0, 1) / self.n**0.5

    def __matmul__(self, v: Tensor) -> Tensor:
        flat = self.V.flatten(0, 1)
        return flat.T @ (flat @ v) / self.n

    @property
    def gram(self) -> Tensor:
        """<V_n V_nᵀ, V_m V_mᵀ> = ‖V_nᵀ V_m‖², [N, N]."""
        return keep(self, "gram", self._gram)

    def _gram(self) -> Tensor:
        if self.positions is not None and cheaper_by_position(own := self.positions()):
            return gram_by_position(own)
        return squared_blocks(self.V, self.V)

    @cached_property
    def column_gram(self) -> Tensor:
        """FFᵀ [N·k, N·k], float64; it has the nonzero eigenvalues of C."""
        flat = self.V.flatten(0, 1)
        return (flat @ flat.T).double() / self.n

    def inners(self, other: Operator) -> Tensor:
        """<V_n V_nᵀ, other> = Σ_k V_nk·other V_nk for every example, [N]."""
        if isinstance(other, LowRankTerms):
            return squared_blocks(self.V, other.V.to(self.V)).mean(1)
        some, own = max(1, AT_ONCE // self.V[0].numel()), convert(other, self.V)
        parts = [part.flatten(0, 1) for part in self.V.split(some)]
        found = torch.cat([((own @ flat.T).T * flat).sum(1) for flat in parts])
        return found.reshape(self.V.shape[:2]).sum(1)

    def quadratic(self, u: Tensor, v: Tensor) -> Tensor:
        """u·V_n V_nᵀ v for every example, [N], for u and v [d]."""
        return ((self.V @ u.to(self.V)) * (self.V @ v.to(self.V))).sum(1)


def cheaper_by_position(positions: Positions) -> bool:
    """Whether T²·(i + k²·(o + 1)), the arithmetic by position, is below k²·o·i by parameter."""
    (_, T, i), (_, k, _, o) = positions.a.shape, positions.b.shape
    return T**2 * (i + k**2 * (o + 1)) < k**2 * o * i


def gram_by_position(positions: Positions) -> Tensor:
    """‖V_nᵀV_m‖² from (V_nᵀV_m)_kl = Σ_tu (b_nkt·b_mlu)(a_nt·a_mu), [N, N], float64."""
    (n, T, i), (_, k, _, o) = positions.a.shape, positions.b.shape
    a, b = positions.a.reshape(n * T, i), positions.b.reshape(n * k * T, o)
    rows = []
    for j in range(n):
        inputs = (positions.a[j] @ a.T).reshape(T, n, T).movedim(1, 0)  # [N, T, T]
        roots = (positions.b[j].reshape(k * T, o) @ b.T).reshape(k, T, n, k, T)
        products = torch.einsum("ktmlu,mtu->mkl", roots, inputs)
        rows.append(products.double().square().sum((1, 2)))
    return torch.stack(rows)


made_of(LowRankTerms, "V")


@conversion.register
def _(operator: LowRankTerms, entries: Tensor) -> LowRankTerms:
    # its positions, in another dtype than V, would be another matrix
    return LowRankTerms(operator.V.to(entries), None, operator.factor_sizes)


@to_dense.register
def _(operator: LowRankTerms) -> Tensor:
    flat = operator.V.flatten(0, 1)
    return flat.T @ flat / operator.n


@diagonal.register
def _(operator: LowRankTerms) -> Tensor:
    return operator.V.square().sum((0, 1)) / operator.n


_KNOWN = (Kronecker, KroneckerSum, KroneckerEigen, Diagonal, BlockDiagonal, LowRank, Spectral)
inner_rule(LowRankTerms, LowRankTerms, KroneckerTerms, *_KNOWN, Damped, Dense, Tensor)(mean_inner)
