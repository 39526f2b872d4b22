"""The problem whose curvature is asked for: a model, a loss, a batch, and its parameter blocks."""

from .blocks import Block, Member
from .problem import Problem

__all__ = ["Block", "Member", "Problem"]
