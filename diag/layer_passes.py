"""Passes that watch layers: their inputs, their outputs, and the loss's gradient at the outputs."""

import math
from dataclasses import dataclass
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad

from diag.blocks import Block, Member
from diag.problem import Problem

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
