"""EKFAC: the best diagonal in KFAC's eigenbasis."""

import torch

from ..operators.eigen import KroneckerEigen
from ..problem.blocks import Block
from ..problem.problem import Problem
from ..registry import approximation
from ._terms import kfac_factors, projected_diagonal, terms


@approximation(
    "ekfac",
    of="ggn",
    kind="curvature",
    reference="George et al. 2018 (arXiv:1806.03884)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def ekfac(problem: Problem, block: Block, of: str = "ggn") -> KroneckerEigen:
    """Keep KFAC's eigenvectors, replace its eigenvalues by the truth's diagonal in their basis.

    (U_G ⊗ U_A) diag(vec S) (U_G ⊗ U_A)ᵀ,  S = mean_n Σ_k (U_Gᵀ V_nk U_A)²  [out, in+1]

    U_G, U_A are the eigenvectors of KFAC's G and A, V_nk [out, in+1] the roots of example n's
    curvature (for the empirical Fisher its gradient), summed over a shared layer's positions
    before squaring. Undamped. S is the Frobenius-nearest diagonal in that basis, so the error is
    never above KFAC's. Exact where KFAC is.

    Raises: ValueError for a block that is no Linear layer or convolution; of="hessian" at several
    positions.
    """
    found = terms(problem, block, of, "ekfac")
    left, right = (torch.linalg.eigh(factor).eigenvectors for factor in kfac_factors(found))
    return KroneckerEigen(left, right, projected_diagonal(found, left, right))
