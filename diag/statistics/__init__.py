"""Confidence intervals, U-statistics, population estimates and split-sample noise of metrics."""

from .intervals import from_influence, from_replicates
from .splits import random_splits, split_floors

__all__ = ["from_influence", "from_replicates", "random_splits", "split_floors"]
