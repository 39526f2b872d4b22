"""Benches: ratios against a peer, both timed in one run on one machine."""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call

from diag import Problem, dense
from diag import exact as truths


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Median time of `repeats` calls, after one that is not counted."""
    function()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        function()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def exact() -> Table:
    """Dense Hessian block of 2,048 parameters against torch.func.hessian and curvlinops.

    First layer of a 64-32-16-32-10 tanh network without bias, 500 examples, float64. Ours starts
    from a fresh Problem each time, its checks included.
    """
    torch.manual_seed(0)
    sizes = (64, 32, 16, 32, 10)
    layers: list[nn.Module] = []
    for inward, outward in pairwise(sizes):
        layers += [nn.Linear(inward, outward, bias=False), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    x, t = torch.randn(500, 64).double(), torch.randint(10, (500,))
    loss = nn.CrossEntropyLoss()

    def ours() -> Tensor:
        problem = Problem(model, loss, x, t)
        return dense(truths.hessian(problem, problem.block("0")))

    def by_torch() -> Tensor:
        def value(weight: Tensor) -> Tensor:
            return loss(functional_call(model, {"0.weight": weight}, (x,)), t)

        weight = model.get_parameter("0.weight").detach()
        return torch.func.hessian(value)(weight).reshape(2048, 2048)

    times = {
        "kronscope": median_seconds(ours, 9),
        "torch.func.hessian": median_seconds(by_torch, 3),
    }
    peer = _curvlinops(model, loss, x, t)
    if peer is not None:
        times["curvlinops (dense)"] = median_seconds(peer, 3)
    apart = (ours() - by_torch()).abs().max() / by_torch().abs().max()
    shown = Table(
        "method",
        "seconds",
        "times ours",
        title=f"2,048 parameters, 500 examples; largest difference {apart:.1e}",
    )
    for name, seconds in times.items():
        shown.add_row(name, f"{seconds:.4f}", f"{seconds / times['kronscope']:.1f}")
    return shown


def _curvlinops(
    model: nn.Module, loss: nn.Module, x: Tensor, t: Tensor
) -> Callable[[], object] | None:
    """The peer's dense Hessian of the same block, where it is installed (extra dev)."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    parameters = [model.get_parameter("0.weight")]

    def dense_hessian() -> object:
        operator = HessianLinearOperator(
            model, loss, parameters, [(x, t)], check_deterministic=False
        )
        return operator @ torch.eye(operator.shape[1], dtype=torch.float64)

    return dense_hessian


BENCHES: dict[str, Callable[[], Table]] = {"exact": exact}
