"""Problem: a model, a loss and a batch, and the parameter blocks whose curvature is computed."""

from .blocks import Block, Member
from .problem import Problem

__all__ = ["Block", "Member", "Problem"]
