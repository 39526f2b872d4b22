"""Block-structured second-order optimizers for the standard PyTorch training loops."""

from .core.base import CurvatureOptimizer
from .core.damping_schedule import Damping
from .core.errors import NumericalError
from .core.levenberg_marquardt import LevenbergMarquardt
from .methods.ekfac import EKFAC, EKFACra
from .methods.eva.eva import Eva
from .methods.exact_fisher.exact_fisher import ExactFisher
from .methods.hessian_free.hessian_free import HessianFree
from .methods.hessian_free.martens import MartensHessianFree
from .methods.kbfgs import KBFGS, KBFGSLimited
from .methods.kfac import KFAC, KFAC2015
from .methods.layerwise.layerwise_step import LayerwiseStep
from .methods.mbf.mbf import MBF
from .methods.shampoo.shampoo import Shampoo
from .methods.tkfac.tkfac import TKFAC
from .methods.tnt.tnt import TNT

__all__ = [
    "EKFAC",
    "KBFGS",
    "KFAC",
    "KFAC2015",
    "MBF",
    "TKFAC",
    "TNT",
    "CurvatureOptimizer",
    "Damping",
    "EKFACra",
    "Eva",
    "ExactFisher",
    "HessianFree",
    "KBFGSLimited",
    "LayerwiseStep",
    "LevenbergMarquardt",
    "MartensHessianFree",
    "NumericalError",
    "Shampoo",
]
