"""TrainingState of a training, as the loop yields it after each step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ..data import Data


@dataclass
class TrainingState:
    """Where a run stands: after `step` steps, `seconds` of training (evaluation excluded).

    of: the names of problem and optimizer. averaged: running average of the parameters, of problems
    that evaluate that. scheduler: of the learning rate, where the problem has one for the
    optimizer; it steps after each epoch. first: the loss of the first batch, None before it.
    finite: the last parameters whose batch had a finite loss, those before the last step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Data
    batch: int
    averaged: AveragedModel | None = None
    scheduler: LRScheduler | None = None
    step: int = 0
    seconds: float = 0.0
    first: float | None = None
    finite: dict[str, Tensor] = field(default_factory=dict)
    of: tuple[str, ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the training set."""
        return len(self.data.train_inputs) // self.batch

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch
