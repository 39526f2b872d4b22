"""KFAC: a layer's curvature as one Kronecker product; two versions for shared weights."""

from ..backpack import quantities
from ..backward.positions import Positions
from ..exact import by_backpack
from ..operators import Kronecker
from ..problem import Block, Problem
from ..registry import approximation
from ._terms import kfac_factors, terms


@approximation(
    reference="Martens and Grosse 2015 (arXiv:1503.05671), section 3; "
    "convolutions: Grosse and Martens 2016 (arXiv:1602.01407)",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def kfac(problem: Problem, block: Block, of: str = "ggn", backend: str = "torch.func") -> Kronecker:
    """Product of the mean Kronecker factors, in place of the mean of the products.

    mean_n(C_n ⊗ a_n a_nᵀ)  ≈  mean_n(C_n) ⊗ mean_n(a_n a_nᵀ)  =  G ⊗ A

    a_n [in+1] is the layer's input with 1 appended, C_n [out, out] the curvature `of` example n's
    loss w.r.t. the pre-activation. Gives G [out, out] ⊗ A [in+1, in+1], undamped; exact when all
    C_n or all a_n a_nᵀ coincide.

    A layer used at T positions (convolution, sequence) drops what couples two positions: A is the
    mean over examples of the SUM over t of a_t a_tᵀ, G the mean over examples and over t of
    Σ_k b_kt b_ktᵀ, b_k [T, out] example n's roots. This is KFC, and KFAC-expand of Eschenhagen et
    al. 2023 (arXiv:2311.00636); exact for a linear network with one squared error per position.

    backend="backpack": BackPACK's KFAC, which samples one label per example (of="fisher_mc").

    Raises: ValueError for a block that is no such layer; of="hessian" at several positions; an
        unknown backend, or one that cannot do this block or truth.
    """
    if by_backpack(backend):
        if of != "fisher_mc":
            raise ValueError(f"BackPACK's KFAC is of='fisher_mc', not '{of}'; kflr is of the ggn")
        return quantities.kfac(problem, block)
    return Kronecker(*kfac_factors(terms(problem, block, of, "kfac")))


@approximation(
    reference="Eschenhagen et al. 2023 (arXiv:2311.00636), KFAC-reduce",
    exact_on=("one_example", "deep_linear_mse", "last_layer_mse", "scalar_input_mse"),
)
def kfac_reduce(problem: Problem, block: Block, of: str = "ggn") -> Kronecker:
    """KFAC-reduce: KFAC with a layer's positions pooled before the outer products.

    A = mean_n ā_n ā_nᵀ with ā_n the mean over t of a_nt; G = mean_n Σ_k (Σ_t b_nkt)(Σ_t b_nkt)ᵀ.
    Gives G [out, out] ⊗ A [in+1, in+1], undamped; with one position it is `kfac`. Exact for a
    linear network whose positions are averaged before one squared error.

    Raises: ValueError for a block that is no such layer; of="hessian" at several positions.
    """
    found = terms(problem, block, of, "kfac_reduce")
    if isinstance(found, Positions):
        found = Positions(found.a.mean(1, keepdim=True), found.b.sum(2, keepdim=True))
    return Kronecker(*kfac_factors(found))
