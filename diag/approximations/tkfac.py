"""TKFAC: a Kronecker product with the trace of the truth."""

from ..operators import Kronecker
from ..problem import Block, Problem
from ..registry import approximation
from ._terms import partial_traces, terms

RELATIVE = 1e-12  # of a factor's norm: a trace below it is rounding, and nothing to divide by


@approximation(
    reference="Gao et al. 2020 (arXiv:2011.10741)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def tkfac(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """Product of the truth's partial traces over its trace, which it keeps.

    δ · Ψ ⊗ Φ = L ⊗ R / tr L,   L = mean_n ‖a_n‖² C_n,   R = mean_n (tr C_n) a_n a_nᵀ

    with δ = tr C and Ψ = L/δ, Φ = R/δ of unit trace; a_n [in+1] the inputs with 1 appended, C_n
    [out, out] the curvature `of` example n's loss at the pre-activation. For a layer used at
    several positions L = mean_n Σ_k V_nk V_nkᵀ, R = mean_n Σ_k V_nkᵀ V_nk, pairs of positions
    included. Undamped; exact where all C_n or all a_n a_nᵀ coincide.

    Raises: ValueError for a block that is no Linear layer or convolution, of="hessian" at several
    positions, and an indefinite truth whose trace vanishes.
    """
    found = terms(problem, block, of, "tkfac")
    left, right = partial_traces(found)
    trace, size = left.trace(), found.a.square().sum() / len(found.a)  # the second is tr A
    if left.norm() == 0 and right.norm() == 0:  # no curvature at all: nothing to keep
        return Kronecker(left, right)
    if trace.abs() <= RELATIVE * left.norm():
        raise ValueError(
            f"tkfac divides by the trace of the {of} of block '{block.name}', which is "
            f"{trace.item():.3g} beside a factor of norm {left.norm().item():.3g}; kfac, ekfac "
            f"and best_kronecker need no trace"
        )
    # the scale is shared so that the factors are weighted means of C_n and of a_n a_nᵀ
    return Kronecker(left / size, right * (size / trace))
