"""Exact curvature of neural networks, its approximations, and optimizers that use them.

The sub-packages `diag`, `optim`, `studies` and `app` are the folders of these names.
"""

from importlib.metadata import version

__version__ = version("kronscope")
