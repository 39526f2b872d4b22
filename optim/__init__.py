"""Block-structured second-order optimizers for the standard PyTorch training loops."""

from optim.kbfgs import KBFGS
from optim.kfac import KFAC

__all__ = ["KBFGS", "KFAC"]
