"""Bench: time of a step of each optimizer over one of SGD with momentum.

The MNIST autoencoder of the K-BFGS paper, batches of 1,000, the papers' update intervals. A step is
all of it: zero_grad, forward, backward and the optimizer's own work. Every optimizer is past the
steps in which it inverts each time; one whole refresh period is timed, several times over, and
SGD-momentum in between, so that a machine that grows slower or faster does so for both. Of each
place in the period the least time counts, for both: what disturbs only ever adds. Inverses are
shared out over the period where an optimizer can do that (stagger=True): as many as otherwise.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import rich.table
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from .. import problems
from ..problems import TrainingProblem
from ..results.tables import Table
from ..training import optimizers

Step = Callable[[], object]

YARDSTICK = "sgd"
LR = 1e-5  # so small that no network leaves where it started: what is timed is then all the same
PERIOD = 20  # the papers' refresh_every
ROUNDS = 5
PAST = PERIOD + 1  # the step number from which no more inverses are taken than in the long run
TARGETS = {"kbfgs": 3.2, "kbfgs_l": 3.2, "kfac": 2.5, "mbf": 1.5, "shampoo": 2.3, "tnt": 2.7}
SPIKE = 1.4


@dataclass(frozen=True)
class StepCost:
    """Time, FLOP and memory of an optimizer's steps.

    seconds, yardstick: mean of a step, its own and SGD-momentum's beside it. spike: the slowest of
    a period over their median. flops: of the matrix products of a step that refreshes nothing.
    floats: of state per parameter.
    """

    name: str
    seconds: float
    yardstick: float
    spike: float
    flops: float
    floats: float

    @property
    def ratio(self) -> float:
        """Over SGD-momentum's step."""
        return self.seconds / self.yardstick


def step() -> rich.table.Table:
    """Every optimizer but Hessian-free on the MNIST autoencoder, float32, two threads."""
    problem = problems.get("mnist-autoencoder")
    torch.manual_seed(0)
    x = torch.rand(problem.batch_size, 784, dtype=torch.float32)  # time does not depend on values
    with threads(2):
        costs = [measured(name, problem, x, x) for name in optimizers.ONE_SOLVE_A_STEP]
    return _table(costs, f"{problem.name}, batch {len(x)}, float32, two threads")


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Context in which PyTorch uses this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measured(
    name: str, problem: TrainingProblem, x: Tensor, t: Tensor, rounds: int = ROUNDS
) -> StepCost:
    """Time whole refresh periods of an optimizer between as many steps of SGD-momentum.

    Of each place in the period the least over the rounds counts.
    Raises: RuntimeError if the loss is no longer finite: what was timed would not be training.
    """
    yardstick, _ = prepared(YARDSTICK, problem, x, t)
    own, optimizer = prepared(name, problem, x, t)
    plain, timed = [period(yardstick)], []
    for _ in range(rounds):
        _skip_to(optimizer, PAST)
        timed.append(period(own))
        plain.append(period(yardstick))
    _skip_to(optimizer, PAST)
    with counter() as count:
        loss = own().detach()
    if not torch.isfinite(loss):
        raise RuntimeError(f"the loss of '{name}' is {loss.item()}: its steps cannot be timed")
    places, reference = (torch.tensor(rows).amin(0) for rows in (timed, plain))
    return StepCost(
        name,
        float(places.mean()),
        float(reference.mean()),
        float(places.max() / places.median()),
        count.get_total_flops(),
        floats_per_parameter(optimizer),
    )


def prepared(
    name: str, problem: TrainingProblem, x: Tensor, t: Tensor
) -> tuple[Callable[[], Tensor], torch.optim.Optimizer]:
    """One step as a function, and the optimizer, after a few steps that are not counted."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = problem.model().to(x.dtype)
        optimizer = optimizers.make(name, model, problem, {"lr": LR, **_shared_out(name)})

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model(x), t)
        loss.backward()
        return loss

    def one_step() -> Tensor:
        return optimizer.step(closure)  # type: ignore[arg-type, return-value]

    for _ in range(3):
        one_step()
    return one_step, optimizer


def _shared_out(name: str) -> dict[str, bool]:
    """stagger=True for those of our optimizers that have it."""
    kind = optimizers.kinds().get(name)
    return {"stagger": True} if kind and "stagger" in inspect.signature(kind).parameters else {}


def period(one_step: Step) -> list[float]:
    """Seconds of each step of a refresh period."""
    seconds = []
    for _ in range(PERIOD):
        begun = time.perf_counter()
        one_step()
        seconds.append(time.perf_counter() - begun)
    return seconds


def _skip_to(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Set the step number of our optimizers; PyTorch's own have none."""
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = number


def floats_per_parameter(optimizer: torch.optim.Optimizer) -> float:
    """Memory of the state in units of four bytes over the number of parameters."""
    kept: dict[int, int] = {}
    inner = getattr(optimizer, "optimizer", None)  # of a wrapper
    for held in (optimizer, inner) if inner else (optimizer,):
        for value in _tensors(dict(held.state)):
            memory = value.untyped_storage()  # once, however many views of it there are
            kept[memory.data_ptr()] = memory.nbytes()
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    return sum(kept.values()) / 4 / count


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value)
    elif isinstance(thing, list | tuple):
        for value in thing:
            yield from _tensors(value)


def _table(costs: list[StepCost], title: str) -> rich.table.Table:
    """One row per optimizer, the cheapest first, its target beside it."""
    arithmetic = next(cost.flops for cost in costs if cost.name == YARDSTICK)
    columns = ("ms", "over SGD-m", "target", f"slowest (≤ {SPIKE})", "products", "floats")
    rows = []
    for cost in sorted(costs, key=lambda cost: cost.ratio):
        target = f"≤ {TARGETS[cost.name]}" if cost.name in TARGETS else ""
        numbers = (f"{cost.spike:.2f}", f"{cost.flops / arithmetic:.2f}", f"{cost.floats:.2f}")
        times = (f"{1e3 * cost.seconds:.1f}", f"{cost.ratio:.2f}")
        rows.append([cost.name, *times, target, *numbers])
    caption = (
        "slowest: of a refresh period, over its median; products: those of a step without refresh, "
        "over SGD-m's; floats: state per parameter"
    )
    return Table(caption, ("optimizer", *columns), rows).for_terminal(title)


def counter() -> FlopCounterMode:
    """A context that counts floating-point operations of products: `get_total_flops()`.

    A product in place of [2, 3] and [3, 4], 2 · 2 · 3 · 4:
        >>> with counter() as count:
        ...     _ = torch.zeros(2, 4).addmm_(torch.ones(2, 3), torch.ones(3, 4))
        >>> count.get_total_flops()
        48
    """
    into = {torch.ops.aten.addmm_: _into, torch.ops.aten.baddbmm_: _into}
    return FlopCounterMode(display=False, custom_mapping=into)


def _into(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    """2 · ... · n · m · k of [..., n, m] and [..., m, k]."""
    return 2 * prod(left) * right[-1]
