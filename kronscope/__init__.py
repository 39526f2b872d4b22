"""Exact curvature of neural networks, its approximations, and optimizers that use them.

The sub-packages `diag`, `optim`, `studies` and `app` are the folders of these names.
"""

from importlib.metadata import version
from pkgutil import extend_path

__version__ = version("kronscope")
__path__ = extend_path(__path__, __name__)  # an installed wheel is found from inside the checkout
