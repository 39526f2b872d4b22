"""Optimizers by name, for command lines and records."""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kronscope import optim

from ..problems import TrainingProblem

Factory = Callable[..., torch.optim.Optimizer]

# where a word of a class name begins: at a capital after a small letter (ExactFisher), at a
# capitalised word or a number after an acronym (KBFGSLimited, KFAC2015), at a suffix (EKFACra)
WORD = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z]{3}|\d)|(?<=[A-Z]{2})(?=[a-z]{2}$)")


def snake_case(name: str) -> str:
    """Class name in small letters, words joined by underscores.

    >>> [snake_case(name) for name in ("KBFGS", "ExactFisher", "KBFGSLimited")]
    ['kbfgs', 'exact_fisher', 'kbfgs_limited']
    >>> snake_case("KFAC2015"), snake_case("EKFACra")
    ('kfac_2015', 'ekfac_ra')
    """
    return WORD.sub("_", name).lower()


def _factory(kind: Callable[..., torch.optim.Optimizer], **own: Any) -> Factory:
    """Builds from a model and its problem, whose likelihood goes to those that sample labels."""
    samples = "likelihood" in _parameters(kind)

    def build(model: nn.Module, problem: TrainingProblem, **hyper: Any) -> torch.optim.Optimizer:
        likelihood = {"likelihood": problem.likelihood} if samples else {}
        return kind(model, **{**likelihood, **own, **hyper})

    return build


def _parameters(kind: Callable[..., Any]) -> list[str]:
    """Names of what a class is built from, whatever its __new__ takes."""
    made_by = kind.__init__ if isinstance(kind, type) else kind  # type: ignore[misc]
    return list(inspect.signature(made_by).parameters)


def kinds() -> dict[str, type[torch.optim.Optimizer]]:
    """The optimizers that `optim` exports and that are built from a model, as wrappers are not."""
    things = {name: getattr(optim, name) for name in optim.__all__}
    return {
        snake_case(name): kind
        for name, kind in things.items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and _parameters(kind)[1] == "model"  # after self
        and not inspect.isabstract(kind)
    }


def _layerwise_kfac(
    model: nn.Module, problem: TrainingProblem, *, max_move: float = 0.03, **hyper: Any
) -> torch.optim.Optimizer:
    """KFAC with a measured step size for each layer; its own lr is not used."""
    kfac = OPTIMIZERS["kfac"](model, problem, **{"lr": 1.0, **hyper})
    return optim.LayerwiseStep(kfac, model, max_move=max_move)


OPTIMIZERS: dict[str, Factory] = {name: _factory(kind) for name, kind in kinds().items()} | {
    "kbfgs_l": _factory(optim.KBFGS, history=100),
    "block_hessian_free": lambda model, problem, **hyper: OPTIMIZERS["hessian_free"](
        model, problem, **{"blocks": problem.partition, **hyper}
    ),
    "layerwise_kfac": _layerwise_kfac,
    "adam": lambda model, _problem, **hyper: torch.optim.Adam(model.parameters(), **hyper),
    "sgd": lambda model, _problem, **hyper: torch.optim.SGD(
        model.parameters(), **{"lr": 0.01, "momentum": 0.9, **hyper}
    ),
}

# where the optimizers stand that one study alone compares; loaded when one is asked for, because
# a study stands on training and not the other way round
VARIANTS = "kronscope.studies.experiments.kbfgs_stability.variants"

# a step is worth tens of gradients: these have a bench and a study of their own
HESSIAN_FREE = ("hessian_free", "block_hessian_free", "martens_hessian_free")
WRAPPED = ("layerwise_kfac",)
UNTUNED = ("kfac_2015", "ekfac_ra", "martens_hessian_free")  # no problem recommends settings
ONE_SOLVE_A_STEP = tuple(n for n in OPTIMIZERS if n not in (*HESSIAN_FREE, *WRAPPED, *UNTUNED))


def make(
    name: str, model: nn.Module, problem: TrainingProblem, hyper: dict[str, Any]
) -> torch.optim.Optimizer:
    """Build the named optimizer with the problem's recommended hyper-parameters, `hyper` over them.

    Raises: ValueError listing the known names, or naming a hyper-parameter it does not take.
    """
    factory = OPTIMIZERS.get(name) or _variant(name)
    if factory is None:
        raise ValueError(f"no optimizer '{name}'; known: {sorted(OPTIMIZERS)}")
    settings = {**problem.optimizers.get(name, {}), **hyper}
    try:
        return factory(model, problem, **settings)
    except TypeError as error:
        raise ValueError(f"optimizer '{name}' does not take {settings}: {error}") from error


def _variant(name: str) -> Factory | None:
    kind = importlib.import_module(VARIANTS).VARIANTS.get(name)
    return None if kind is None else _factory(kind)
