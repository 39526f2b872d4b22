"""Metrics: (truth, operator) -> Estimate; one per file, this folder is the registry."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from ..registry import Metric
from ..registry import metric as registry

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

# the files carry the names of their functions: after the loop the function is what is meant
globals().update({name: entry.function for name, entry in registry.items()})

__all__ = ["Metric", "registry", *registry]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"no metric '{name}'; known: {sorted(registry)}")
