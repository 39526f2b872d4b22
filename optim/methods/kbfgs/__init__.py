"""K-BFGS and K-BFGS(L): Kronecker-factored quasi-Newton; its pieces, for variants of it."""

from . import statistics, step_limit
from .bfgs import acceptable, bfgs_, double_damping
from .formulas import input_action_
from .kbfgs import COUNTS, KBFGS
from .kbfgs_limited import KBFGSLimited

__all__ = [
    "COUNTS",
    "KBFGS",
    "KBFGSLimited",
    "acceptable",
    "bfgs_",
    "double_damping",
    "input_action_",
    "statistics",
    "step_limit",
]
