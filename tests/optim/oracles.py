"""Slow dense float64 oracles of every optimizer, written from the formulas alone.

ORACLES = runpy.run_path(".../oracles.py")["ORACLES"]
oracle = ORACLES["KFAC"](model, loss, lr=1.0, damping=0.1)
oracle.step(batch, score); oracle.P["0"]; oracle.curvature["0"]; oracle.model
"""

import runpy
from pathlib import Path


def load(name):
    return runpy.run_path(str(Path(__file__).with_name(name)))


LAYERS, TENSORS = load("oracles_layers.py"), load("oracles_tensors.py")
BFGS = load("oracles_bfgs.py")
ORACLES = {
    "KBFGS": BFGS["KBFGS"],
    **{name: LAYERS[name] for name in ("KFAC", "EKFAC", "TKFAC", "MBF", "Eva", "ExactFisher")},
    **{name: TENSORS[name] for name in ("Shampoo", "TNT")},
}
