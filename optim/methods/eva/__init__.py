"""Eva: rank-one Kronecker factors."""

from .eva import Eva

__all__ = ["Eva"]
