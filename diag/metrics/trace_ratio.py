"""Trace of the approximation over that of the truth."""

from ..estimate import Estimate
from ..operators import Operator, trace
from ..operators.compositions import identity_like
from ..registry import metric
from ..statistics.intervals import from_replicates, norms


@metric(
    formula="tr B / tr C",
    range="(−∞, ∞)",
    best="1",
    reference="Gao et al. 2020 (arXiv:2011.10741): methods that keep the trace",
)
def trace_ratio(truth: Operator, approximation: Operator) -> Estimate:
    """Total curvature of the approximation over that of the truth, tr B / tr C.

    Range (−∞, ∞), [0, ∞) for positive semi-definite matrices; 1 is best, above 1 steps are too
    short. NaN for two zero matrices.
    Interval: bootstrap over the truth's examples, the approximation held fixed; open where a batch
    cannot tell the truth's trace from zero.
    """
    traces = norms(truth, identity_like(truth)).cross
    return from_replicates(trace(approximation) / traces, truth)
