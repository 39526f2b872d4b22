"""Which parameters each optimizer preconditions together, and by which layer."""

from .blocks import Block, Variable, find_blocks
from .partitions import Part, partition

__all__ = ["Block", "Part", "Variable", "find_blocks", "partition"]
