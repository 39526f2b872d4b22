"""Bench: exact errors of every layer of networks of the papers' size, and their time.

Two networks: the MNIST autoencoder after some epochs of K-BFGS on the real files, whose live state
is measured too, and ResNet32 on CIFAR-10 pictures. Each measurement runs in a process of its own,
so that its peak memory is its own, and is held against the time its matrix products would take at
the rate of a large product measured in the same process.
"""

import multiprocessing
import resource
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import rich.table
import torch
from rich.console import Group
from torch import Tensor
from torch.nn.functional import cross_entropy

from kronscope.diag import Block, Estimate, Operator, Problem, approximations, exact, live, metrics
from kronscope.diag.spectra import best_kronecker_curve

from .. import data, problems, training
from ..problems import _networks
from ..results.tables import Table
from .step import counter

EPOCHS = 3
BUILT = ("kfac", "mini_block", "diagonal")
RANKS = 10
BUDGET = 12 * 2**30  # the 4 and 16 GiB asked for include the libraries and the data
COLUMNS = ("kfac", "kbfgs", "mini_block", "diagonal", "best r=1", "best r=10", "noise floor")


@dataclass(frozen=True)
class ScaleResult:
    """Errors by layer of one measurement, with its time, FLOP and memory."""

    title: str
    cells: dict[str, dict[str, str]]
    seconds: float
    flops: float
    rate: float
    peak: float

    @property
    def floor(self) -> float:
        """Seconds that the counted matrix products take at the rate of a large one."""
        return self.flops / self.rate


def scale() -> Group:
    """Every layer of the MNIST autoencoder and of ResNet32, exactly."""
    trained = alone(trained_autoencoder)
    found = [
        alone(measured_autoencoder, trained, 200),
        alone(measured_autoencoder, trained, 1000),
        alone(measured_resnet, 64),
    ]
    columns = ("measurement", "seconds", "floor", "ratio", "peak GiB")
    summary = Table("", columns, [_cost(each) for each in found]).for_terminal("exact at scale")
    return Group(*(_errors(each) for each in found), summary)


def _cost(each: ScaleResult) -> list[str]:
    floor = f"{each.floor:.1f} ({each.flops / 1e9:,.0f} GFLOP at {each.rate / 1e9:.0f} GFLOP/s)"
    ratio = f"{each.seconds / each.floor:.2f}"
    return [each.title, f"{each.seconds:.1f}", floor, ratio, f"{each.peak:.2f}"]


def alone(function: Callable[..., Any], *given: Any) -> Any:
    """function(*given) in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *given).result()


def trained_autoencoder() -> tuple[dict[str, Tensor], dict[str, Operator]]:
    """Parameters after some epochs of K-BFGS at the published settings, and its live curvature.

    Seed 10 is one that converges at these settings (most diverge: see the study of stability).
    """
    settings = training.Settings(problems.get("mnist-autoencoder"), "kbfgs", epochs=EPOCHS, seed=10)
    for state in training.steps(settings):
        last = state
    parameters = {n: t.detach().clone() for n, t in last.model.state_dict().items()}
    return parameters, live.curvatures(last.optimizer)  # type: ignore[arg-type]


def measured_autoencoder(
    trained: tuple[dict[str, Tensor], dict[str, Operator]], examples: int
) -> ScaleResult:
    """All eight layers on the first training examples, float32."""
    parameters, curvatures = trained
    setting = problems.get("mnist-autoencoder")
    model = setting.model()
    model.load_state_dict(parameters)
    x = setting.data().train_inputs[:examples].clone()
    title = f"MNIST autoencoder after {EPOCHS} epochs of K-BFGS, {examples} examples"

    def measure() -> dict[str, dict[str, str]]:
        problem = Problem(model, setting.loss, x, x, budget=BUDGET)
        return dict(cells(problem, problem.blocks(), lambda block: curvatures[block.name]))

    return timed(title, measure)


def measured_resnet(examples: int) -> ScaleResult:
    """All 31 convolutions of ResNet32 after a few steps of SGD that set its batch norms, float32.

    On a part of CIFAR-10. K-BFGS is replayed on the problem's data.
    """
    torch.manual_seed(0)
    own, model = data.cifar10_subset(), _networks.resnet32()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for rows in torch.arange(20 * 128).split(128):
        sgd.zero_grad()
        cross_entropy(model(own.train_inputs[rows]), own.train_targets[rows]).backward()
        sgd.step()
    model.eval()
    x, t = own.train_inputs[:examples].clone(), own.train_targets[:examples]
    title = f"ResNet32 on CIFAR-10, {examples} examples"

    def measure() -> dict[str, dict[str, str]]:
        problem = Problem(model, cross_entropy, x, t, budget=BUDGET)
        convolutions = [b for b in problem.blocks() if len(b.members[0].shapes[0]) == 4]
        replayed = approximations.kbfgs
        return dict(cells(problem, convolutions, lambda block: replayed(problem, block)))

    return timed(title, measure)


def timed(title: str, measure: Callable[[], dict[str, dict[str, str]]]) -> ScaleResult:
    """Run a measurement, count its matrix products, and time large ones before and after."""
    before, count = rate_of_products(), counter()
    start = time.perf_counter()
    with count:
        found = measure()
    seconds = time.perf_counter() - start
    rate = (before + rate_of_products()) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return ScaleResult(title, found, seconds, count.get_total_flops(), rate, peak)


def rate_of_products(size: int = 2048, repeats: int = 8) -> float:
    """FLOP/s of square float32 products."""
    left, right = torch.rand(size, size), torch.rand(size, size)
    left @ right
    start = time.perf_counter()
    for _ in range(repeats):
        left @ right
    return repeats * 2 * size**3 / (time.perf_counter() - start)


def cells(
    problem: Problem, blocks: list[Block], kbfgs: Callable[[Block], Operator]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Each layer's relative errors against its exact GGN, with 95 % intervals.

    K-BFGS's curvature is taken at its best scale: its damping is inside.
    """
    for block, truth in exact.truths(problem, blocks, "ggn"):
        built = {name: approximations.registry[name].function(problem, block) for name in BUILT}
        error = metrics.relative_error
        found = {name: error(truth, made) for name, made in built.items()}
        found["kbfgs"] = metrics.relative_error_best_scale(truth, kbfgs(block))
        curve = best_kronecker_curve(truth, RANKS)
        found |= {f"best r={r}": best for r, best in enumerate(curve, start=1)}
        found["noise floor"] = metrics.noise_floor(truth)
        yield block.name, {name: _cell(error) for name, error in found.items()}


def _cell(error: Estimate) -> str:
    return f"{error.value:.3g} [{error.low:.3g}, {error.high:.3g}]"


def _errors(each: ScaleResult) -> rich.table.Table:
    rows = [[layer, *(row[name] for name in COLUMNS)] for layer, row in each.cells.items()]
    return Table("", ("layer", *COLUMNS), rows).for_terminal(each.title)
