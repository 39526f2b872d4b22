"""TNT: tensor-normal training."""

from .tnt import TNT

__all__ = ["TNT"]
