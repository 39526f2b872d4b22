"""Training and test tensors of a data set, and how arrays become them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Data:
    """Inputs and targets of a data set: training [n, ...] and test [m, ...].

    Inputs are float32; targets float32 where the inputs are reconstructed, else classes, int64.
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def reconstruction(train: np.ndarray, test: np.ndarray) -> Data:
    """Data of an autoencoder: the targets are the inputs."""
    x, y = (torch.from_numpy(np.ascontiguousarray(a, dtype=np.float32)) for a in (train, test))
    return Data(x, x, y, y)


def labelled(inputs: np.ndarray, labels: np.ndarray, train: int) -> Data:
    """Data of a classifier: the first `train` examples to train, the others to test."""
    x = torch.from_numpy(np.ascontiguousarray(inputs, dtype=np.float32))
    t = torch.from_numpy(labels.astype(np.int64))
    return Data(x[:train], t[:train], x[train:], t[train:])


def standardised(train: np.ndarray, test: np.ndarray) -> Data:
    """Data of an autoencoder on standardised rows [n, d].

    The mean over the rows to train is taken off each entry; all are divided by one number, so that
    the variance of the entries averages 1.
    """
    x = train.astype(np.float32)
    mean = x.mean(0, dtype=np.float64).astype(np.float32)
    x -= mean
    deviation = np.float32(np.sqrt(np.square(x).mean(dtype=np.float64)))
    x /= deviation
    return reconstruction(x, (test - mean) / deviation)
