"""The training loop: any optimizer on any problem, one step at a time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from kronscope.optim import NumericalError

from ..data import Data
from ..problems import TrainingProblem
from ..results import options
from . import checkpoints, optimizers
from .state import TrainingState

Closure = Callable[[], Tensor]

FOREVER = 10**6  # epochs of a training that something else ends
DIVERGED_AT = 100.0  # times the first loss: far beyond what any run recovered from
# errors that end a training because of its settings, unlike, say, a full memory
NUMERICAL_ERRORS = (NumericalError, torch.linalg.LinAlgError)


class DivergedError(NumericalError):
    """The loss is not finite or has grown beyond DIVERGED_AT times the first one.

    `parameters` is the model's state at the last step whose loss was finite.
    """

    def __init__(
        self, step: int, loss: float, first: float, parameters: dict[str, Tensor], of: str = "batch"
    ):
        super().__init__(
            f"training diverged at step {step}: the {of} loss is {loss:.6g} (first {first:.6g}); "
            f"the parameters of the last step with a finite loss are kept; try a smaller lr or a "
            f"larger damping"
        )
        self.step, self.loss, self.parameters = step, loss, parameters


@dataclass(frozen=True)
class Settings:
    """Settings of a training run; `hyper` replaces the problem's recommended values.

    Raises: ValueError for numbers that cannot be. Whether the device is there `start` asks.
    """

    problem: TrainingProblem
    optimizer: str
    epochs: int
    seed: int = 0
    batch_size: int = 0  # 0: the problem's
    device: str = "cpu"
    hyper: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = {name: getattr(self, name) for name in ("epochs", "seed", "batch_size")}
        options.options(own)


def start(settings: Settings) -> TrainingState:
    """Model, optimizer and data on the device, before the first step and before the warm-up.

    Raises: ValueError for a device that is not there, an unknown optimizer or hyper-parameter, and
    more examples in a batch than there are.
    """
    options.device(settings.device)
    problem = settings.problem
    data = _on(problem.data(), settings.device)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = problem.model().to(settings.device, data.train_inputs.dtype)
        # inside: sampled labels follow the seed too
        optimizer = optimizers.make(settings.optimizer, model, problem, settings.hyper)
    batch = settings.batch_size or problem.batch_size
    if batch > len(data.train_inputs):
        raise ValueError(f"batch size {batch} exceeds the {len(data.train_inputs)} examples")
    averaged = None
    if problem.averaging:
        averaged = AveragedModel(
            model, multi_avg_fn=get_ema_multi_avg_fn(problem.averaging), use_buffers=True
        )
    schedule = problem.schedule.get(settings.optimizer)
    scheduler = None if schedule is None else schedule.scheduler(optimizer)
    of = (problem.name, settings.optimizer)
    return TrainingState(model, optimizer, data, batch, averaged, scheduler, of=of)


def _on(data: Data, device: str) -> Data:
    tensors = (data.train_inputs, data.train_targets, data.test_inputs, data.test_targets)
    return Data(*(tensor.to(device) for tensor in tensors))


def steps(settings: Settings, resume: Path | None = None) -> Iterator[TrainingState]:
    """Train, yielding the state before the first step and after each one.

    What the caller does between two yields is not counted in `state.seconds`. Batches are blocks of
    the set reshuffled each epoch, an incomplete one dropped, as in the published K-BFGS code; those
    of the warm-up too are augmented where the problem says how.

    Raises: DivergedError, with the last finite parameters; the yielded state stays readable.
    """
    state = start(settings)
    if resume is not None:
        checkpoints.load(state, resume)
    elif hasattr(state.optimizer, "warm_up"):
        begun = time.perf_counter()
        blocks = enumerate(_blocks(state))
        with _draws_of(settings, -1):
            state.optimizer.warm_up(_closure(state, settings, rows, (1, k)) for k, rows in blocks)
        state.seconds += time.perf_counter() - begun
    yield state
    last, before = _snapshot(state.model), _snapshot(state.model)
    while state.step < settings.epochs * state.steps_per_epoch:
        begun = time.perf_counter()
        closure = _closure(state, settings, _rows(state, settings.seed), (0, state.step))
        torch._foreach_copy_(list(before.values()), list(state.model.state_dict().values()))
        with _draws_of(settings, state.step):
            loss = state.optimizer.step(closure).detach().item()  # type: ignore[attr-defined, arg-type]
        state.first = loss if state.first is None else state.first
        if not loss <= DIVERGED_AT * abs(state.first):  # also true of NaN
            raise DivergedError(state.step, loss, state.first, last)
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        last, before = before, last  # the loss at these parameters is now known to be finite
        state.finite = last
        state.step += 1
        if state.scheduler is not None and state.step % state.steps_per_epoch == 0:
            state.scheduler.step()
        state.seconds += time.perf_counter() - begun
        yield state


def place(settings: Settings, state: TrainingState) -> dict[str, Any]:
    """Columns of the records that name a training and its progress."""
    return {
        "problem": settings.problem.name,
        "optimizer": settings.optimizer,
        "seed": settings.seed,
        "step": state.step,
        "epoch": state.epoch,
        "seconds": state.seconds,
    }


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _blocks(state: TrainingState) -> list[Tensor]:
    """Consecutive batches in file order: the pass the papers initialise their statistics with."""
    n = len(state.data.train_inputs)
    order = torch.arange(n, device=state.data.train_inputs.device)
    return list(order[: state.batch * state.steps_per_epoch].split(state.batch))


def _rows(state: TrainingState, seed: int) -> Tensor:
    """The examples of the next batch; the order of an epoch depends on seed and epoch alone."""
    n = len(state.data.train_inputs)
    epoch, place = divmod(state.step, state.steps_per_epoch)
    rows = _order(n, seed, epoch)[place * state.batch : (place + 1) * state.batch]
    return rows.to(state.data.train_inputs.device)


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator)


def batch(state: TrainingState, settings: Settings) -> tuple[Tensor, Tensor]:
    """Inputs and targets of the next step, augmented as that step will have them."""
    return _batch(state, settings, _rows(state, settings.seed), (0, state.step))


def _batch(
    state: TrainingState, settings: Settings, rows: Tensor, draw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of these examples; `draw` is the batch's own number for augmentation."""
    inputs, targets = state.data.train_inputs[rows], state.data.train_targets[rows]
    if settings.problem.augment is not None:
        inputs = settings.problem.augment(inputs, _random(settings.seed, draw))
    return inputs, targets


def _closure(
    state: TrainingState, settings: Settings, rows: Tensor, draw: tuple[int, int]
) -> Closure:
    """Loss and gradient of these examples."""
    inputs, targets = _batch(state, settings, rows, draw)

    def closure() -> Tensor:
        state.optimizer.zero_grad()
        loss = settings.problem.loss(state.model(inputs), targets)
        loss.backward()
        return loss

    return closure


def _random(seed: int, draw: tuple[int, int]) -> torch.Generator:
    """A batch's generator depends on seed and place alone, so that a resumed run draws the same."""
    return torch.Generator().manual_seed(_mixed(seed, draw))


def _mixed(seed: int, draw: tuple[int, int]) -> int:
    (mixed,) = np.random.SeedSequence((seed % 2**32, *draw)).generate_state(1)
    return int(mixed)


@contextmanager
def _draws_of(settings: Settings, step: int) -> Iterator[None]:
    """Context in which dropout depends on seed and step alone; step -1 is the warm-up."""
    device = torch.device(settings.device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(_mixed(settings.seed, (2, step + 1)))
        yield


@torch.no_grad()
def batch_loss(state: TrainingState, settings: Settings) -> float:
    """Loss of the next step's batch in evaluation mode; leaves the run as it is."""
    inputs, targets = batch(state, settings)
    with _evaluation_mode(state.model):
        return float(settings.problem.loss(state.model(inputs), targets))


@torch.no_grad()
def evaluate(state: TrainingState, problem: TrainingProblem, chunk: int = 1000) -> dict[str, float]:
    """Mean losses over the training and test sets, {"train_loss": ..., "test_loss": ...}.

    Taken at the running average of the parameters where the problem has one.
    Of classes also "train_accuracy" and "test_accuracy", the share that has the largest output.
    """
    data, found = state.data, {}
    model = state.model if state.averaged is None else state.averaged
    sets = {
        "train": (data.train_inputs, data.train_targets),
        "test": (data.test_inputs, data.test_targets),
    }
    with _evaluation_mode(model):
        for name, (inputs, targets) in sets.items():
            loss = right = 0.0
            for x, t in zip(inputs.split(chunk), targets.split(chunk), strict=True):
                output = model(x)
                loss += len(x) * float(problem.loss(output, t))
                if problem.likelihood == "categorical":
                    right += int((output.argmax(1) == t).sum())
            found[f"{name}_loss"] = loss / len(inputs)
            if problem.likelihood == "categorical":
                found[f"{name}_accuracy"] = right / len(inputs)
    return found


def evaluated(state: TrainingState, problem: TrainingProblem) -> dict[str, float]:
    """`evaluate` with a check that the run has not diverged.

    Raises: DivergedError where the training loss is not finite or beyond DIVERGED_AT times the
    first one: no later batch would show what the last step has done.
    """
    found = evaluate(state, problem)
    loss = found["train_loss"]
    if state.first is not None and state.finite and not loss <= DIVERGED_AT * abs(state.first):
        raise DivergedError(state.step, loss, state.first, state.finite, "training")
    return found


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which batch norm uses its running statistics and nothing drops out."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
