"""Step sizes measured for each layer, around any optimizer."""

from .layerwise_step import LayerwiseStep

__all__ = ["LayerwiseStep"]
