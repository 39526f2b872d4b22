"""Best sums of Kronecker products: SVD of the block rearranged by Van Loan and Pitsianis."""

import torch
from torch import Tensor

from ..operators import KroneckerSum, Operator, dense, inner, keep
from ..problem.blocks import Block
from ..truths.kronecker_terms import KroneckerTerms
from ..truths.low_rank_terms import LowRankTerms
from .lanczos_svd import leading_triples

REARRANGED_UP_TO = 2**24  # entries of a rearranged block that is decomposed in full
TOLERANCE = 1e-4  # residual of a leading singular triple found from products alone


def leading_kronecker(operator: Operator, rank: int, block: Block | None = None) -> KroneckerSum:
    """Best sum of `rank` Kronecker products, the leading terms of C = Σ σ_k left_k ⊗ right_k.

    Raises: ValueError for a dense operator without a `block` that has one matrix [W, b].
    """
    if isinstance(operator, KroneckerTerms):
        values, left, right = operator.kronecker_svd
        lefts, rights = left(rank), right(rank)
        return KroneckerSum(values[:rank, None, None].to(lefts) * lefts, rights)
    o, i = _factor_sizes(operator, block)
    if isinstance(operator, LowRankTerms) and (o * i) ** 2 > REARRANGED_UP_TO:
        values, U, V = keep(operator, ("svds", rank), lambda: _by_products(operator, rank))
    else:
        U, values, V = keep(operator, ("rearranged", o, i), lambda: _decomposed(operator, o, i))
        U, values, V = U[:, :rank], values[:rank], V[:rank]
    lefts, rights = U.T.reshape(-1, o, o), V.reshape(-1, i, i)
    return KroneckerSum(values[:, None, None] * lefts, rights)


def best_kronecker_errors(operator: Operator, ranks: int, block: Block | None = None) -> Tensor:
    """Relative error (‖C‖² − Σ_{k<=r} σ_k²)^½ / ‖C‖ of the best sum for r = 1 ... ranks, [ranks].

    Raises: ValueError for a dense operator without a `block` that has one matrix [W, b].
    """
    if isinstance(operator, KroneckerTerms):
        values = operator.kronecker_svd.values.double()
        tail = values.square().flip(0).cumsum(0).flip(0)  # summed from the small end: no cancelling
        tail = torch.cat([tail, tail.new_zeros(ranks + 1)])
        return (tail[1 : ranks + 1] / tail[0]).sqrt()
    leading = leading_kronecker(operator, ranks, block)
    values = leading.left.flatten(1).norm(dim=1).double()  # right factors have norm 1
    values = torch.cat([values, values.new_zeros(ranks - len(values))])
    left = 1 - values.square().cumsum(0) / inner(operator, operator)
    return left.clamp(min=0).sqrt()


def _by_products(mean: LowRankTerms, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples of X -> (1/N) Σ V X Vᵀ, [i, i] -> [o, o], V [o, i], by Lanczos."""
    assert mean.factor_sizes is not None
    (o, i), V = mean.factor_sizes, mean.V
    wide = V.reshape(-1, o, i).movedim(1, 0).contiguous()  # [o, N·k, i]
    tall = wide.movedim(2, 0).mT.contiguous()  # [i, N·k, o]
    across, down = wide.reshape(o, -1), tall.reshape(i, -1)

    def forward(x: Tensor) -> Tensor:
        return ((wide @ x.reshape(i, i)).reshape(o, -1) @ across.T / mean.n).reshape(-1)

    def backward(y: Tensor) -> Tensor:
        return ((tall @ y.reshape(o, o)).reshape(i, -1) @ down.T / mean.n).reshape(-1)

    # near the answer: the input factor; and a little of everything, antisymmetric parts too
    factor = (down @ down.T).reshape(-1)
    noise = torch.randn(i * i, generator=torch.Generator().manual_seed(rank)).to(V)
    start = factor / factor.norm() + 0.1 * noise / noise.norm()
    found = leading_triples(forward, backward, start, rank, TOLERANCE)
    return found.values, found.left.T, found.right


def _factor_sizes(operator: Operator, block: Block | None) -> tuple[int, int]:
    known = getattr(operator, "factor_sizes", None)
    if known is not None:
        return known
    if block is None:
        raise ValueError(
            f"the factor sizes of a {type(operator).__name__} truth are unknown; Kronecker "
            f"singular values need its block, and the metrics built on them the exact GGN or "
            f"Fisher of a layer with one matrix [W, b]"
        )
    member = block.single
    if member is None or not member.w_bar:
        raise ValueError(f"block {block} is not one matrix [W, b], so it has no Kronecker factors")
    return member.matrix_shape


def _decomposed(operator: Operator, o: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """SVD of [o², i²], whose row (o, p) is the tile of output neurons o and p."""
    rearranged = dense(operator).reshape(o, i, o, i).transpose(1, 2).reshape(o * o, i * i)
    U, values, V = torch.linalg.svd(rearranged, full_matrices=False)
    return U, values, V
