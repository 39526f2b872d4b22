"""Training problems (model, data, loss and settings) and their registry; one family per file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from ..data import Data
from . import _hyper
from ._hyper import Schedule, Searched

Loss = Callable[[Tensor, Tensor], Tensor]
Augment = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True)
class TrainingProblem:
    """A model, its data and the settings it is trained with.

    likelihood: of which the loss is the negative logarithm. optimizers: recommended hyper-
    parameters by optimizer name, as data; `training.optimizers` knows the names. sources: where
    those come from; of optimizers that are not named there they are ours. searched: the values that
    `kronscope tune searched` tries, and whose they are, by optimizer: of what the papers tuned as
    far as that is known, else ours, which `register` adds. initialisation: how the model begins, in
    words. schedule: how the learning rate changes, by optimizer, and for how many epochs they were
    then trained; that of the others is constant. measure_damping: λ of the damped metrics.
    partition: groups of module names, each name standing for all layers inside its module: the
    blocks of block-diagonal Hessian-free. Together they hold every layer once; () where a problem
    has no partition of its own. averaging: decay of the running average of the parameters (Polyak)
    at which losses are evaluated; 0 has none. augment: changes the inputs of each training batch,
    from draws of a generator; losses are evaluated at the inputs themselves.
    """

    name: str
    summary: str
    model: Callable[[], nn.Module]
    loss: Loss
    likelihood: str
    data: Callable[[], Data]
    batch_size: int
    epochs: int
    measure_damping: float
    optimizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    partition: Sequence[Sequence[str]] = ()
    averaging: float = 0.0
    augment: Augment | None = None
    schedule: dict[str, Schedule] = field(default_factory=dict)
    searched: dict[str, Searched] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    initialisation: str = _hyper.PYTORCH

    def epochs_of(self, optimizer: str) -> int:
        """How long to train with this optimizer: as its schedule says, else `epochs`."""
        return self.schedule[optimizer].epochs if optimizer in self.schedule else self.epochs


# a problem whose outputs are logits of classes
classifier = partial(TrainingProblem, loss=cross_entropy, likelihood="categorical")

PROBLEMS: dict[str, TrainingProblem] = {}


def register(problem: TrainingProblem, **twin: Any) -> None:
    """Add a problem and, from the fields in `twin`, its small twin to the registry.

    An optimizer without a search of its own gets `_hyper.ours`. Settings of kbfgs hold for
    kbfgs_limited too, so that both are judged alike.
    """
    for each in (problem, *([small(problem, **twin)] if twin else [])):
        found = {name: _hyper.ours(own) for name, own in each.optimizers.items()}
        each = replace(each, searched=found | each.searched)
        limited = {
            name: own | {"kbfgs_limited": own["kbfgs"]}
            for name in ("optimizers", "schedule", "searched")
            if "kbfgs" in (own := getattr(each, name))
        }
        PROBLEMS[each.name] = replace(each, **limited)


def small(problem: TrainingProblem, **own: Any) -> TrainingProblem:
    """The small twin of a problem, `<name>-small`, which trains in seconds and needs no file.

    own: its summary, model and data, and whatever else differs. All other fields are the
    problem's, but for batches of 150, 10 epochs, and no schedule, augmentation or sources.
    """
    plain = {"batch_size": 150, "epochs": 10, "schedule": {}, "augment": None, "sources": {}}
    return replace(problem, **{"name": f"{problem.name}-small", **plain, **own})


def get(name: str) -> TrainingProblem:
    """Return the problem of this name. Raises: ValueError listing the known names."""
    if name not in PROBLEMS:
        raise ValueError(f"no problem '{name}'; known: {sorted(PROBLEMS)}")
    return PROBLEMS[name]


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
