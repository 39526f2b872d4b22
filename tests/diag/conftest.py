"""Tiny problems on which theory says something, by name."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from kronscope.diag import Problem


def mlp(sizes: list[int], activation: type[nn.Module] | None, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inward, outward in pairwise(sizes):
        layers.append(nn.Linear(inward, outward, bias=bias))
        if activation is not None:
            layers.append(activation())
    return nn.Sequential(*(layers[:-1] if activation else layers))


def one_example() -> tuple[Problem, str]:
    model = mlp([4, 5, 3], nn.Tanh)
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(1, 4), torch.tensor([1])), "0"


def deep_linear_mse() -> tuple[Problem, str]:
    model = mlp([4, 3, 5, 2], None)
    return Problem(model, nn.MSELoss(), torch.randn(9, 4), torch.randn(9, 2)), "1"


def last_layer_mse() -> tuple[Problem, str]:
    model = mlp([4, 5, 3], nn.Tanh)
    return Problem(model, nn.MSELoss(), torch.randn(9, 4), torch.randn(9, 3)), "2"


def scalar_input_mse() -> tuple[Problem, str]:
    """One weight per output and no bias: the block is diagonal."""
    model = nn.Sequential(nn.Linear(1, 4, bias=False))
    return Problem(model, nn.MSELoss(), torch.randn(9, 1), torch.randn(9, 4)), "0"


CASES: dict[str, Callable[[], tuple[Problem, str]]] = {
    "one_example": one_example,
    "deep_linear_mse": deep_linear_mse,
    "last_layer_mse": last_layer_mse,
    "scalar_input_mse": scalar_input_mse,
}


@pytest.fixture
def case() -> Callable[[str], tuple[Problem, str]]:
    """case(name) -> (problem, block name)."""
    return lambda name: CASES[name]()


@pytest.fixture
def network() -> Callable[..., nn.Sequential]:
    return mlp


@pytest.fixture
def classifier() -> Problem:
    """6-5-4-3 tanh, softmax cross-entropy, 30 examples."""
    model = mlp([6, 5, 4, 3], nn.Tanh)
    return Problem(model, nn.CrossEntropyLoss(), torch.randn(30, 6), torch.randint(3, (30,)))


@pytest.fixture
def by_autograd() -> Callable[[Problem, str], Tensor]:
    """Dense Hessian of the batch-mean loss w.r.t. a layer's [W, b], by torch.func.hessian."""

    def hessian(problem: Problem, layer: str) -> Tensor:
        module = problem.model.get_submodule(layer)
        names = [f"{layer}.{n}".lstrip(".") for n, _ in module.named_parameters()]
        tensors = [problem.model.get_parameter(n).detach() for n in names]
        w_bar = torch.cat([t.flatten(1) if t.ndim > 1 else t[:, None] for t in tensors], 1)
        columns = [t[0].numel() if t.ndim > 1 else 1 for t in tensors]

        def value(v: Tensor) -> Tensor:
            parts = v.reshape(w_bar.shape).split(columns, 1)
            named = {n: p.reshape(t.shape) for n, p, t in zip(names, parts, tensors, strict=True)}
            outputs = torch.func.functional_call(problem.model, named, (problem.inputs,))
            return problem.loss(outputs, problem.targets)

        return torch.func.hessian(value)(w_bar.flatten())

    return hessian
