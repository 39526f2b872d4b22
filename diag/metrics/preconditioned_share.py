"""Share of the preconditioned spectrum within a factor of two of one."""

from ..estimate import Estimate
from ..operators import Operator
from ..registry import metric
from ..spectra.pencils import share_between, within_reach
from ..spectra.preconditioned import NotPositiveDefiniteError

NEAR = (0.5, 2.0)  # within a factor of two of the curvature B was meant to remove


@metric(
    formula="share of the eigenvalues of (B + μI)^−½ (C + λI) (B + μI)^−½ in [½, 2]",
    range="[0, 1]",
    best="1",
    reference="Saad 2003, section 9.2 (the preconditioned matrix)",
)
def preconditioned_share(
    truth: Operator,
    approximation: Operator,
    damping: float,
    approximation_damping: float | None = None,
) -> Estimate:
    """Share of the d directions that B scales right, to a factor of two.

    Range [0, 1], 1 is best; 0 where B + μI is not positive definite. Robust to single outliers,
    unlike the condition number.
    damping: λ. approximation_damping: μ, λ unless given; 0 where B has its damping inside.
    Exact: from all eigenvalues, for a truth of few columns by counting (Sylvester's law of
    inertia). No interval: a count has no derivative.

    Raises: ValueError over the memory budget, naming what to ask instead.
    """
    truth = within_reach(truth, "preconditioned_share")
    added = damping if approximation_damping is None else approximation_damping
    try:
        share = share_between(truth, damping, approximation, added, NEAR)
    except NotPositiveDefiniteError:
        share = 0.0
    return Estimate(share, n=getattr(truth, "n", 0))
