"""KFRA: KFLR with an output factor averaged over the batch at every module, by BackPACK."""

from ..backpack import quantities
from ..operators import Kronecker
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation


@approximation(
    "kfra",
    of="ggn",
    kind="curvature",
    reference="Botev et al. 2017 (arXiv:1706.03662)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse"),
)
def kfra(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """Kronecker-factored recursive approximation: G ⊗ A with G from a recursion over modules.

    G = mean_n(H_n) at the outputs, then  G ← mean_n(J_nᵀ G J_n)  down through each module

    H_n [c, c] is the Hessian of example n's loss w.r.t. the outputs, J_n the Jacobian of the
    module's output w.r.t. its input: one matrix is passed down for the whole batch, so what the
    Jacobians of different modules have in common is lost. A [in+1, in+1] is of the layer's inputs
    with 1 appended. For a convolution with T positions A = mean_n Σ_t a_t a_tᵀ, and G, summed over
    pairs of positions, is divided by T. Exact for one example, and where KFLR is and no J_n depends
    on n.

    of: "ggn", or "fisher", which is equal to it.

    Raises: ValueError for another `of`, a block that is not one Linear or Conv layer, or a module,
    loss or setting that BackPACK does not support (docs/backpack.md lists them).
    """
    quantities.check_target(problem, "kfra", of)
    return quantities.kfra(problem, block)
