"""Bench: a dense Hessian block against torch.func.hessian and curvlinops."""

import statistics
import timeit
from collections.abc import Callable
from itertools import pairwise

import rich.table
import torch
from torch import Tensor, nn
from torch.func import functional_call

from kronscope.diag import Problem, dense
from kronscope.diag import exact as truths

from ..results.tables import Table

Loss = Callable[[Tensor, Tensor], Tensor]


def median_seconds(
    function: Callable[..., object], repeats: int, prepare: Callable[[], object] | None = None
) -> float:
    """Median time of `repeats` calls after one that is not counted, garbage collection off.

    prepare: makes the argument of each call, untimed.
    """
    namespace = {"function": function, "prepare": prepare}
    call, setup = ("function(made)", "made = prepare()") if prepare else ("function()", "pass")
    times = timeit.repeat(call, setup, number=1, repeat=repeats + 1, globals=namespace)
    return statistics.median(times[1:])


def exact() -> rich.table.Table:
    """Dense Hessian block of 2,048 parameters against torch.func.hessian and curvlinops.

    First layer of a 64-32-16-32-10 tanh network without bias, 500 examples, float64. Ours is
    timed from a Problem that has computed nothing yet, as the peers are given their model and
    data, and once more with the Problem's copy and checks in it.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inward, outward in pairwise((64, 32, 16, 32, 10)):
        layers += [nn.Linear(inward, outward, bias=False), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).double()
    x, t = torch.randn(500, 64).double(), torch.randint(10, (500,))
    loss = nn.CrossEntropyLoss()

    def checked() -> Problem:
        return Problem(model, loss, x, t)

    def ours(problem: Problem) -> Tensor:
        return dense(truths.hessian(problem, problem.block("0")))

    peers = {"torch.func.hessian": _torch_func(model, loss, x, t)}
    if operator := _curvlinops(model, loss, x, t):
        peers["curvlinops, dense"] = operator
    times = {
        "kronscope": median_seconds(ours, 21, prepare=checked),
        "kronscope, checks included": median_seconds(lambda: ours(checked()), 21),
    }
    times |= {name: median_seconds(peer, 5) for name, peer in peers.items()}
    expected = peers["torch.func.hessian"]().detach()
    apart = float((ours(checked()).detach() - expected).abs().max() / expected.abs().max())
    return _table(times, f"2,048 parameters, 500 examples; largest difference {apart:.1e}")


def _table(times: dict[str, float], title: str) -> rich.table.Table:
    """Seconds of each method, and over those of the first."""
    first = next(iter(times.values()))
    rows = [[name, f"{took:.4f}", f"{took / first:.1f}"] for name, took in times.items()]
    return Table("", ("method", "seconds", "times the first"), rows).for_terminal(title)


def _torch_func(model: nn.Module, loss: Loss, x: Tensor, t: Tensor) -> Callable[[], Tensor]:
    weight = model.get_parameter("0.weight").detach()

    def value(w: Tensor) -> Tensor:
        return loss(functional_call(model, {"0.weight": w}, (x,)), t)

    return lambda: torch.func.hessian(value)(weight).reshape(weight.numel(), -1)


def _curvlinops(model: nn.Module, loss: Loss, x: Tensor, t: Tensor) -> Callable[[], Tensor] | None:
    """Dense Hessian of the same block by curvlinops; None if it is not installed (extra dev)."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        return None
    weight = model.get_parameter("0.weight")

    def dense_hessian() -> Tensor:
        operator = HessianLinearOperator(model, loss, [weight], [(x, t)], check_deterministic=False)
        return operator @ torch.eye(weight.numel(), dtype=torch.float64)

    return dense_hessian
