"""Training any optimizer on any problem, one step at a time."""

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
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from studies import optimizers
from studies.data import Data
from studies.problems import TrainingProblem

Closure = Callable[[], Tensor]

FOREVER = 10**6  # epochs of a training that something else ends
DIVERGED_AT = 100.0  # times the first loss: far beyond what any run recovered from


class DivergedError(RuntimeError):
    """The loss is not finite or has grown beyond DIVERGED_AT times the first one.

    `parameters` is the model's state at the last step whose loss was finite.
    """

    def __init__(self, step: int, loss: float, first: float, parameters: dict[str, Tensor]):
        super().__init__(
            f"training diverged at step {step}: the batch loss is {loss:.6g} (first {first:.6g}); "
            f"the parameters of the last step with a finite loss are kept; try a smaller lr or a "
            f"larger damping"
        )
        self.step, self.loss, self.parameters = step, loss, parameters


@dataclass(frozen=True)
class Settings:
    """What determines a training run; `hyper` goes over the problem's recommended values."""

    problem: TrainingProblem
    optimizer: str
    epochs: int
    seed: int = 0
    batch_size: int = 0  # 0: the problem's
    device: str = "cpu"
    hyper: dict[str, Any] = field(default_factory=dict)


@dataclass
class State:
    """Where a run stands: after `step` steps, `seconds` of training (evaluation excluded).

    averaged: running average of the parameters, of problems that evaluate that. scheduler: of the
    learning rate, where the problem has one for the optimizer; it steps after each epoch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: Data
    steps_per_epoch: int
    averaged: AveragedModel | None = None
    scheduler: LRScheduler | None = None
    step: int = 0
    seconds: float = 0.0

    @property
    def epoch(self) -> float:
        """Epochs done."""
        return self.step / self.steps_per_epoch


def start(settings: Settings) -> State:
    """Model, optimizer and data on the device, before the first step and before the warm-up."""
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
    return State(model, optimizer, data, len(data.train_inputs) // batch, averaged, scheduler)


def _on(data: Data, device: str) -> Data:
    tensors = (data.train_inputs, data.train_targets, data.test_inputs, data.test_targets)
    return Data(*(tensor.to(device) for tensor in tensors))


def steps(settings: Settings, resume: Path | None = None) -> Iterator[State]:
    """Train, yielding the state before the first step and after each one.

    What the caller does between two yields is not counted in `state.seconds`. Batches are blocks of
    the set reshuffled each epoch, an incomplete one dropped, as in the published K-BFGS code; those
    of the warm-up too are augmented where the problem says how.

    Raises: DivergedError, with the last finite parameters; the yielded state stays readable.
    """
    state = start(settings)
    if resume is not None:
        load(state, resume)
    elif hasattr(state.optimizer, "warm_up"):
        begun = time.perf_counter()
        blocks = enumerate(_blocks(state))
        state.optimizer.warm_up(_closure(state, settings, rows, (1, k)) for k, rows in blocks)
        state.seconds += time.perf_counter() - begun
    yield state
    last, before = _snapshot(state.model), _snapshot(state.model)
    first: float | None = None
    while state.step < settings.epochs * state.steps_per_epoch:
        begun = time.perf_counter()
        closure = _closure(state, settings, _rows(state, settings.seed), (0, state.step))
        torch._foreach_copy_(list(before.values()), list(state.model.state_dict().values()))
        loss = state.optimizer.step(closure).detach().item()  # type: ignore[attr-defined, arg-type]
        first = loss if first is None else first
        if not loss <= DIVERGED_AT * abs(first):  # also true of NaN
            raise DivergedError(state.step, loss, first, last)
        if state.averaged is not None:
            state.averaged.update_parameters(state.model)
        last, before = before, last  # the loss at these parameters is now known to be finite
        state.step += 1
        if state.scheduler is not None and state.step % state.steps_per_epoch == 0:
            state.scheduler.step()
        state.seconds += time.perf_counter() - begun
        yield state


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _blocks(state: State) -> list[Tensor]:
    """Consecutive batches in file order: the pass the papers initialise their statistics with."""
    n = len(state.data.train_inputs)
    size = n // state.steps_per_epoch
    order = torch.arange(n, device=state.data.train_inputs.device)
    return list(order[: size * state.steps_per_epoch].split(size))


def _rows(state: State, seed: int) -> Tensor:
    """The examples of the next batch; the order of an epoch depends on seed and epoch alone."""
    n = len(state.data.train_inputs)
    epoch, place = divmod(state.step, state.steps_per_epoch)
    size = n // state.steps_per_epoch
    rows = _order(n, seed, epoch)[place * size : (place + 1) * size]
    return rows.to(state.data.train_inputs.device)


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    return torch.randperm(n, generator=generator)


def _batch(
    state: State, settings: Settings, rows: Tensor, draw: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Inputs and targets of these examples; `draw` is the batch's own number for augmentation."""
    inputs, targets = state.data.train_inputs[rows], state.data.train_targets[rows]
    if settings.problem.augment is not None:
        inputs = settings.problem.augment(inputs, _random(settings.seed, draw))
    return inputs, targets


def _closure(state: State, settings: Settings, rows: Tensor, draw: tuple[int, int]) -> Closure:
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
    (mixed,) = np.random.SeedSequence((seed % 2**32, *draw)).generate_state(1)
    return torch.Generator().manual_seed(int(mixed))


@torch.no_grad()
def batch_loss(state: State, settings: Settings) -> float:
    """Loss of the coming step's batch, with the model as `evaluate` takes it; disturbs nothing."""
    rows = _rows(state, settings.seed)
    inputs, targets = _batch(state, settings, rows, (0, state.step))
    with _finished(state.model):
        return float(settings.problem.loss(state.model(inputs), targets))


@torch.no_grad()
def evaluate(state: State, problem: TrainingProblem, chunk: int = 1000) -> dict[str, float]:
    """Means over the whole sets: {"train_loss": ..., "test_loss": ...}.

    Taken at the running average of the parameters where the problem has one.
    Of classes also "train_accuracy" and "test_accuracy", the share that has the largest output.
    """
    data, found = state.data, {}
    model = state.model if state.averaged is None else state.averaged
    sets = {
        "train": (data.train_inputs, data.train_targets),
        "test": (data.test_inputs, data.test_targets),
    }
    with _finished(model):
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


@contextmanager
def _finished(model: nn.Module) -> Iterator[None]:
    """Inside, batch norm goes by its running statistics and leaves them, and nothing drops out."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def save_parameters(parameters: dict[str, Tensor], path: Path) -> None:
    """Write a model's state_dict, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(parameters, temporary)
    temporary.replace(path)


def save(state: State, path: Path) -> None:
    """Write a checkpoint from which `steps(settings, resume=path)` goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(
        {
            "model": state.model.state_dict(),
            "optimizer": state.optimizer.state_dict(),
            "averaged": None if state.averaged is None else state.averaged.state_dict(),
            "scheduler": None if state.scheduler is None else state.scheduler.state_dict(),
            "step": state.step,
            "seconds": state.seconds,
        },
        temporary,
    )
    temporary.replace(path)


def load(state: State, path: Path) -> None:
    """Put a checkpoint's model, optimizer and counters into a fresh state.

    Raises: ValueError naming a missing file or one of another model or optimizer.
    """
    if not path.is_file():
        raise ValueError(f"no checkpoint {path}; `kronscope train` writes one after each epoch")
    content = torch.load(path, weights_only=True)
    try:
        state.model.load_state_dict(content["model"])
        state.optimizer.load_state_dict(content["optimizer"])
        if state.averaged is not None:
            state.averaged.load_state_dict(content["averaged"])
        if state.scheduler is not None:
            state.scheduler.load_state_dict(content["scheduler"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"{path} is no checkpoint of this problem and optimizer: {error}"
        ) from error
    state.step, state.seconds = content["step"], content["seconds"]
