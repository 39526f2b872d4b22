"""ExactFisher: each layer's batch Fisher inverted in the space of examples."""

from .exact_fisher import ExactFisher

__all__ = ["ExactFisher"]
