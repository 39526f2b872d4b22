"""Approximations built from a problem's data, one method per file; their registry."""

from typing import Any

from ..registry import Approximation
from ..registry import approximation as registry

registry.load(__name__, __path__)

# the files carry the names of their functions: from here on the function is what is meant
globals().update({name: entry.function for name, entry in registry.items()})

__all__ = ["Approximation", "registry", *registry]


def __getattr__(name: str) -> Any:
    raise AttributeError(registry.missing(name))
