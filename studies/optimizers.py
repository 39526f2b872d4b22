"""Optimizers by name, for command lines and records."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import optim
from studies.problems import TrainingProblem

Factory = Callable[..., torch.optim.Optimizer]

OPTIMIZERS: dict[str, Factory] = {
    "kbfgs": lambda model, _problem, **hyper: optim.KBFGS(model, **hyper),
    "kbfgs_l": lambda model, _problem, **hyper: optim.KBFGS(model, **{"history": 100, **hyper}),
    "kfac": lambda model, problem, **hyper: optim.KFAC(
        model, **{"likelihood": problem.likelihood, **hyper}
    ),
    "adam": lambda model, _problem, **hyper: torch.optim.Adam(model.parameters(), **hyper),
    "sgd": lambda model, _problem, **hyper: torch.optim.SGD(
        model.parameters(), **{"lr": 0.01, "momentum": 0.9, **hyper}
    ),
}


def make(
    name: str, model: nn.Module, problem: TrainingProblem, hyper: dict[str, Any]
) -> torch.optim.Optimizer:
    """Build the named optimizer with the problem's recommended hyper-parameters, `hyper` over them.

    Raises: ValueError listing the known names, or naming a hyper-parameter it does not take.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{name}'; known: {sorted(OPTIMIZERS)}")
    settings = {**problem.optimizers.get(name, {}), **hyper}
    try:
        return OPTIMIZERS[name](model, problem, **settings)
    except TypeError as error:
        raise ValueError(f"optimizer '{name}' does not take {settings}: {error}") from error
