"""Slow dense float64 oracles of every optimizer, written from the formulas alone.

oracle = ORACLES["KFAC"](model, loss, lr=1.0, damping=0.1)
oracle.step(batch, score); oracle.P["0"]; oracle.curvature["0"]; oracle.model
"""

from tests.optim.oracles_bfgs import KBFGS
from tests.optim.oracles_layers import EKFAC, KFAC, MBF, TKFAC, Eva, ExactFisher
from tests.optim.oracles_tensors import TNT, Shampoo

KINDS = (KBFGS, KFAC, EKFAC, TKFAC, MBF, Eva, ExactFisher, Shampoo, TNT)
ORACLES = {kind.__name__: kind for kind in KINDS}
