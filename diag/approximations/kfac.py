"""KFAC: a layer's curvature as one Kronecker product."""

from diag.blocks import Block
from diag.operators import Kronecker
from diag.problem import Problem
from diag.registry import approximation
from diag.samples import sample_truth


@approximation(
    "kfac",
    of="ggn",
    kind="curvature",
    reference="Martens and Grosse 2015 (arXiv:1503.05671), section 3",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse"),
)
def kfac(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """Swap the mean of Kronecker products for the product of their means.

    mean_n(C_n ⊗ a_n a_nᵀ)  ≈  mean_n(C_n) ⊗ mean_n(a_n a_nᵀ)  =  G ⊗ A

    a_n [in+1] is the layer's input with 1 appended, C_n [out, out] the curvature `of` example n's
    loss w.r.t. the pre-activation: with "ggn" this is KFAC type-2 (equal to the exact Fisher's),
    with "hessian" what K-BFGS aims at. Gives G [out, out] ⊗ A [in+1, in+1], undamped.
    Exact when all C_n or all a_n a_nᵀ coincide.

    Raises: ValueError for a block that is not a Linear layer with one row per example.
    """
    truth = sample_truth(problem, block, of, "kfac")
    return Kronecker(truth.left_mean, truth.right_mean)
