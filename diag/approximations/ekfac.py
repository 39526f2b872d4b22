"""EKFAC: the exact diagonal of the curvature in KFAC's eigenbasis."""

import torch

from ..operators.eigen import KroneckerEigen
from ..problem import Block, Problem
from ..registry import approximation
from ._terms import kfac_factors, projected_diagonal, terms


@approximation(
    reference="George et al. 2018 (arXiv:1806.03884)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def ekfac(problem: Problem, block: Block, of: str = "ggn") -> KroneckerEigen:
    """KFAC's eigenvectors with the truth's diagonal in their basis for eigenvalues.

    (U_G ⊗ U_A) diag(vec S) (U_G ⊗ U_A)ᵀ,  S = mean_n Σ_k (U_Gᵀ V_nk U_A)²  [out, in+1]

    U_G, U_A are the eigenvectors of KFAC's G and A, V_nk [out, in+1] the roots of example n's
    curvature, summed over a shared layer's positions before squaring. Undamped. S is the nearest
    diagonal in that basis: the error is never above KFAC's, and zero where KFAC's is.

    Raises: ValueError for a block that is no Linear layer or convolution; of="hessian" at several
    positions.
    """
    found = terms(problem, block, of, "ekfac")
    left, right = (torch.linalg.eigh(factor).eigenvectors for factor in kfac_factors(found))
    return KroneckerEigen(left, right, projected_diagonal(found, left, right))
