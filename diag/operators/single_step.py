"""A single solver step used in place of an operator: only B⁻¹g for one gradient g is known."""

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from .forms import to_dense
from .solving import solver_rule
from .structures import Map, square

MEANT = (
    "a SingleStep is the step for one gradient: {}; step_cosine, step_quality, decrease_efficiency "
    "and rho need no more, with gradient=step.gradient and approximation_damping=0"
)


@dataclass(frozen=True, eq=False)
class SingleStep:
    """Operator with B⁻¹ gradient = step, both [d], for one gradient; θ moves to θ - step.

    For truncated conjugate gradients, which are no linear map; `solve` refuses other gradients.

    Raises: ValueError for vectors of different sizes, or not finite.

    >>> from kronscope.diag.operators import solve
    >>> g = torch.tensor([2.0, 4.0])
    >>> solve(SingleStep(gradient=g, step=torch.tensor([1.0, 1.0])), g)
    tensor([1., 1.])
    """

    gradient: Tensor
    step: Tensor

    def __post_init__(self) -> None:
        shapes = tuple(self.gradient.shape), tuple(self.step.shape)
        if self.gradient.ndim != 1 or shapes[0] != shapes[1]:
            raise ValueError(f"gradient and step must both be [d], not {shapes[0]} and {shapes[1]}")
        for name, vector in {"gradient": self.gradient, "step": self.step}.items():
            if not torch.isfinite(vector).all():
                raise ValueError(f"the {name} holds NaN or Inf")

    shape = square(lambda self: len(self.step))

    def __matmul__(self, v: Tensor) -> NoReturn:
        raise TypeError(MEANT.format("it has no product with a vector"))


@to_dense.register
def _(_operator: SingleStep) -> Tensor:
    raise TypeError(MEANT.format("it has no entries"))


@solver_rule(SingleStep)
def _(operator: SingleStep, damping: float) -> Map:
    if damping:
        raise ValueError(MEANT.format(f"damping {damping:g} cannot be added to it"))

    def apply(v: Tensor) -> Tensor:
        g = operator.gradient
        same = (v.dtype, v.device, v.shape) == (g.dtype, g.device, g.shape) and torch.equal(v, g)
        if not same:
            raise ValueError(MEANT.format("it was made for another gradient than this one"))
        return operator.step

    return apply
