"""The best Kronecker approximations in Frobenius norm, a bound for all others."""

from ..exact import truth
from ..operators import KroneckerSum
from ..problem import Block, Problem
from ..registry import approximation
from ..spectra.kronecker_svd import leading_kronecker


@approximation(
    reference="Van Loan and Pitsianis 1993",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def best_kronecker(problem: Problem, block: Block, rank: int = 1, of: str = "ggn") -> KroneckerSum:
    """The sum of `rank` Kronecker products nearest to the exact block in Frobenius norm.

    argmin ‖C − Σ_k G_k ⊗ A_k‖_F, from the leading singular vectors of the rearranged block; its
    error is (Σ_{k>rank} σ_k²)^½.

    Raises: ValueError for rank < 1 or a block that is not one layer with [W, b].
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, not {rank}")
    return leading_kronecker(truth(problem, block, of), rank, block)
