"""Steps of an approximation and of the truth for one gradient, in the exact quadratic model.

The model of the loss around θ is m(d) = f - g·d + ½ d·(C + λI)d for the step θ - d. Its minimum is
at d = (C + λI)⁻¹ g, where the decrease is ½ g·(C + λI)⁻¹ g.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from ..operators import Damped, Operator, solve, solver
from ..problem import Block, Problem
from ..problem.functional import plain_attention

SLACK = 1e-6  # by which rounding and an iterative solve may exceed Cauchy and Schwarz


class Steps(NamedTuple):
    """Approximate step d = (B + μI)⁻¹ g and exact step e = (C + λI)⁻¹ g, both [d].

    slope = g·d, bend = d·(C + λI)d, best = g·e, twice the greatest decrease of the model; each [].
    """

    taken: Tensor
    exact: Tensor
    slope: Tensor
    bend: Tensor
    best: Tensor

    @property
    def sound(self) -> bool:
        """Whether C + λI may be positive definite, so that the model has a minimum.

        False where bend or best is not positive, or (g·d)² > bend · best against Cauchy and
        Schwarz; for a zero gradient too.
        """
        positive = self.bend > 0 and self.best > 0
        return bool(positive and self.slope**2 <= (1 + SLACK) * self.bend * self.best)


def steps(
    truth: Operator, approximation: Operator, damping: float, gradient: Tensor, added: float
) -> Steps:
    """Both steps for a gradient g [d]; damping: λ of the truth, added: μ of the approximation.

    Raises: torch.linalg.LinAlgError for a singular damped matrix.
    """
    taken = solve(Damped(approximation, added), gradient)
    exact = solver(truth, damping)(gradient)
    bend = taken @ (truth @ taken + damping * taken)
    return Steps(taken, exact, gradient @ taken, bend, gradient @ exact)


def example_losses(problem: Problem, outputs: Tensor) -> Tensor:
    """Loss of every example, [n]; their mean is the loss, as `Problem` has checked."""
    pairs = zip(outputs.split(1), problem.targets.split(1), strict=True)
    return torch.stack([problem.loss(z, t).reshape(()) for z, t in pairs])


def example_decreases(problem: Problem, block: Block, d: Tensor) -> Tensor:
    """Decrease of every example's loss, ℓ_n(θ) - ℓ_n(θ - d), for a step d [d] in the block, [n]."""
    with torch.no_grad():
        before, after = problem.outputs(block, torch.zeros_like(d)), problem.outputs(block, -d)
        return example_losses(problem, before) - example_losses(problem, after)


@plain_attention()
def example_slopes(problem: Problem, block: Block, d: Tensor) -> Tensor:
    """Slope g_n·d of every example's loss along d, [n], g_n its gradient in the block."""
    z, tangent, *_ = jvp(lambda v: problem.outputs(block, v), (torch.zeros_like(d),), (d,))
    return (grad(problem.total_loss)(z) * tangent).reshape(len(z), -1).sum(1)
