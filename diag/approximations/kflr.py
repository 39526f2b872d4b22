"""KFLR and KFRA: a layer's GGN block as one Kronecker product, by BackPACK."""

from ..backpack import quantities
from ..operators import Kronecker
from ..problem import Block, Problem
from ..registry import approximation


@approximation(
    reference="Botev et al. 2017 (arXiv:1706.03662)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse"),
)
def kflr(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """Kronecker-factored low rank: GGN of the pre-activation ⊗ second moment of the input.

    mean_n(C_n) ⊗ mean_n(a_n a_nᵀ)  =  G ⊗ A

    G [out, out] comes from BackPACK, which back-propagates a square root of the output Hessian, of
    a rank up to the number of outputs; A [in+1, in+1] is of the layer's inputs with 1 appended. For
    a Linear layer with one row per example this is `kfac` of the GGN. At T positions
    A = mean_n Σ_t a_t a_tᵀ and G is 1/T of the curvature of a shift shared by all positions.
    Exact when all C_n or all a_n a_nᵀ coincide. of: "ggn", or "fisher", which is equal to it.

    Raises: ValueError for another `of`, a block that is not one Linear or Conv layer, or what
    BackPACK does not support (docs/backpack.md lists it).
    """
    quantities.check_target(problem, "kflr", of)
    return quantities.kflr(problem, block)


@approximation(
    reference="Botev et al. 2017 (arXiv:1706.03662)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse"),
)
def kfra(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """Kronecker-factored recursive approximation: G ⊗ A with G from a recursion over modules.

    G = mean_n(H_n) at the outputs, then  G ← mean_n(J_nᵀ G J_n)  down through each module

    H_n [c, c] is the Hessian of example n's loss w.r.t. the outputs, J_n the Jacobian of the
    module's output w.r.t. its input: one matrix is passed down for the whole batch. A as in `kflr`;
    at T positions G, summed over pairs of positions, is divided by T. Exact for one example, and
    where KFLR is and no J_n depends on n. of, Raises: as `kflr`.
    """
    quantities.check_target(problem, "kfra", of)
    return quantities.kfra(problem, block)
