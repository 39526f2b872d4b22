"""Bench: time of one CG iteration of Hessian-free over a step of SGD with momentum.

The MNIST autoencoder of the K-BFGS paper, batches of 1,000, the whole batch as curvature batch. The
time of an iteration is the difference between steps of many and of few, so that what a step does
once (its gradient, the linearisation) is not in it; steps of SGD-momentum are timed in between.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import rich.table
import torch
from torch import Tensor, nn

from kronscope.optim import HessianFree

from .. import problems
from ..problems import TrainingProblem
from ..results.tables import Table
from .step import YARDSTICK, counter, prepared, threads

FEW, MANY = 2, 12  # iterations
ROUNDS = 7
PLAIN, BLOCKS = 1.6, 1.8  # to reach: over a gradient step, and over plain Hessian-free
DAMPING = 1e-4  # so small that conjugate gradients do not end before they are told to


@dataclass(frozen=True)
class IterationCost:
    """Median seconds of a CG iteration and of an SGD-momentum step, and their FLOP.

    flops: of an iteration and of such a step. once: what a step costs beside its iterations.
    """

    name: str
    iteration: float
    once: float
    gradient: float
    flops: tuple[int, int]

    @property
    def ratio(self) -> float:
        """An iteration over a step of SGD-momentum."""
        return self.iteration / self.gradient


def hessian_free() -> rich.table.Table:
    """Plain and with three blocks, on the MNIST autoencoder, float32, two threads."""
    problem = problems.get("mnist-autoencoder")
    torch.manual_seed(0)
    x = torch.rand(problem.batch_size, 784, dtype=torch.float32)  # time does not depend on values
    with threads(2):
        costs = [
            measured("plain", problem, x, None),
            measured("three blocks", problem, x, thirds(problem.model())),
        ]
    return _table(costs, f"{problem.name}, batch {len(x)}, float32, two threads")


def thirds(model: nn.Module) -> list[list[str]]:
    """The Linear layers in three consecutive groups of about equal size."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    total = sum(layer.weight.numel() for _, layer in layers)
    groups: list[list[str]] = [[], [], []]
    before = 0.0
    for name, layer in layers:
        groups[int(3 * (before + layer.weight.numel() / 2) / total)].append(name)
        before += layer.weight.numel()
    return groups


def measured(
    name: str, problem: TrainingProblem, x: Tensor, blocks: list[list[str]] | None
) -> IterationCost:
    """Time steps of few and of many iterations, and of SGD-momentum, in turn.

    Raises: RuntimeError if conjugate gradients ended before they were told to.
    """
    step = _prepared(problem, x, blocks)
    sgd, _ = prepared(YARDSTICK, problem, x, x)
    few, many, gradient = [], [], []
    for _ in range(ROUNDS):
        few.append(_seconds(lambda: step(FEW)))
        gradient.append(_seconds(sgd))
        many.append(_seconds(lambda: step(MANY)))
        gradient.append(_seconds(sgd))
    a, b = statistics.median(few), statistics.median(many)
    iteration = (b - a) / (MANY - FEW)
    flops = (_flops(lambda: step(FEW + 1)) - _flops(lambda: step(FEW)), _flops(sgd))
    return IterationCost(name, iteration, a - FEW * iteration, statistics.median(gradient), flops)


def _prepared(
    problem: TrainingProblem, x: Tensor, blocks: list[list[str]] | None
) -> Callable[[int], None]:
    """A function that does a step of so many iterations without moving the parameters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = problem.model().to(x.dtype)
    optimizer = HessianFree(
        model, 0.0, DAMPING, 0.0, 0.0, problem.likelihood, len(x), blocks=blocks
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = problem.loss(model(x), x)
        loss.backward()
        return loss

    def step(iterations: int) -> None:
        optimizer.param_groups[0]["max_cg"] = iterations
        before = _iterations(optimizer)
        optimizer.step(closure)
        if _iterations(optimizer) - before < iterations * len(optimizer.parts):
            raise RuntimeError(f"conjugate gradients ended before {iterations} iterations")

    step(1)  # chooses how products are computed, and makes the state
    return step


def _iterations(optimizer: HessianFree) -> int:
    counts = [state["counts"] for state in optimizer.state.values() if "counts" in state]
    return sum(int(count[1]) for count in counts)


def _seconds(function: Callable[[], object]) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def _flops(function: Callable[[], object]) -> int:
    with counter() as count:
        function()
    return count.get_total_flops()


def _table(costs: list[IterationCost], title: str) -> rich.table.Table:
    columns = ("ms", "over SGD-m", "target", "over plain", "target", "products", "once")
    plain, rows = costs[0], []
    for cost in costs:
        ratio = cost.ratio / plain.ratio  # the machine may be slower by now
        targets = (f"≤ {PLAIN}", "") if cost is plain else ("", f"≤ {BLOCKS}")
        times = (f"{1e3 * cost.iteration:.1f}", f"{cost.ratio:.2f}", targets[0], f"{ratio:.2f}")
        more = (f"{cost.flops[0] / cost.flops[1]:.2f}", f"{cost.once / cost.gradient:.1f}")
        rows.append([cost.name, *times, targets[1], *more])
    caption = (
        "products: arithmetic of matrix products over that of an SGD-m step; once: what a step "
        "costs beside its iterations, over an SGD-m step"
    )
    return Table(caption, ("one CG iteration", *columns), rows).for_terminal(title)
