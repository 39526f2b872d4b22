"""Block-structured second-order optimizers for the standard PyTorch training loops."""

from optim.conjugate_gradients import RelativeProgress
from optim.damping import Damping
from optim.ekfac import EKFAC
from optim.errors import NumericalError
from optim.eva import Eva
from optim.exact_fisher import ExactFisher
from optim.hessian_free import HessianFree
from optim.hessian_free_options import (
    AdaptiveDamping,
    Backtracking,
    DiagonalPreconditioner,
    LineSearch,
)
from optim.kbfgs import KBFGS
from optim.kfac import KFAC
from optim.layerwise_step import LayerwiseStep
from optim.levenberg_marquardt import LevenbergMarquardt
from optim.mbf import MBF
from optim.shampoo import Shampoo
from optim.tkfac import TKFAC
from optim.tnt import TNT

__all__ = [
    "EKFAC",
    "KBFGS",
    "KFAC",
    "MBF",
    "TKFAC",
    "TNT",
    "AdaptiveDamping",
    "Backtracking",
    "Damping",
    "DiagonalPreconditioner",
    "Eva",
    "ExactFisher",
    "HessianFree",
    "LayerwiseStep",
    "LevenbergMarquardt",
    "LineSearch",
    "NumericalError",
    "RelativeProgress",
    "Shampoo",
]
