"""Overlap of the leading eigenspaces."""

import math

import torch
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, dense
from ..registry import metric
from ..spectra.eigenspaces import leading, leading_space, leading_vectors
from ..spectra.extreme_eigenpairs import DENSE_UP_TO
from ..statistics.influence import of_form
from ..statistics.intervals import from_influence
from ..truths.per_example import PerExampleTerms


@metric(
    formula="‖UᵀW‖_F² / max(dim U, dim W), U and W the spaces of the k greatest eigenvalues",
    range="[0, 1]",
    best="1",
    reference="Krzanowski 1979; Gur-Ari, Roberts and Dyer 2018 (arXiv:1812.04754)",
)
def eigenspace_overlap(truth: Operator, approximation: Operator, k: int = 10) -> Estimate:
    """Mean squared cosine between the leading eigenspaces of truth and approximation.

    Range [0, 1], 1 is best; about k/d for unrelated spaces. U [d, k] spans the eigenspace of the
    truth's k greatest positive eigenvalues (fewer where it has fewer), W that of as many of the
    approximation, both with the eigenvalues that tie with the k-th; directions that only one of the
    two has count as missed. NaN for a truth without a positive eigenvalue.
    Interval: first order, up to d = 400; above, by Lanczos, value only.

    Raises: ValueError for k < 1; spectra.NotConvergedError where Lanczos does not converge.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    U = leading_vectors(truth, k)
    if not U.shape[1]:
        return Estimate(math.nan, n=getattr(truth, "n", 0))
    kept = min(k, U.shape[1])
    space = leading_space(approximation, kept)
    size = max(U.shape[1], space.size)
    value = min(space.coordinates(U).square().sum().item() / size, 1.0)

    def influence(truth: PerExampleTerms) -> Tensor:
        return _influence(truth, leading_vectors(approximation, kept), k) / size

    return from_influence(truth, value, influence if len(U) <= DENSE_UP_TO else None, 0.0, 1.0)


def _influence(truth: PerExampleTerms, W: Tensor, k: int) -> Tensor:
    """Influence of each example on ‖UᵀW‖_F², [N].

    du_i = Σ_{j outside} u_j (u_j·dC u_i) / (λ_i - λ_j), hence d‖UᵀW‖² = 2 Σ_i u_i·dC r_i with
    r_i = Σ_{j outside} u_j (u_j·WWᵀu_i) / (λ_i - λ_j).
    """
    values, vectors = torch.linalg.eigh(dense(truth))
    top = leading(values, k)
    U, rest = vectors[:, top], vectors[:, ~top]
    gaps = values[top][None, :] - values[~top][:, None]  # [outside, inside]
    turned = rest @ ((rest.T @ (W @ (W.T @ U))) / gaps)
    pairs = zip(U.T, turned.T, strict=True)
    return 2 * torch.stack([of_form(truth, u, r) for u, r in pairs]).sum(0)
