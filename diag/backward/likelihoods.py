"""Likelihoods p(t | outputs): score, label sampler, Fisher information of the outputs.

Of a loss s · (-log p), such as a mean over output elements, the Fisher is s times the Fisher
information: `exact.fisher` then equals `exact.ggn`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot

if TYPE_CHECKING:
    from ..problem.problem import Problem


@dataclass(frozen=True)
class Likelihood:
    """Functions of a likelihood p(t|z) at outputs z [n, ...].

    score(z, t) = -∂ log p(t|z)/∂z; sample(z, generator) draws t; fisher(z, u) = E[score scoreᵀ] u;
    labels(z, t): whether t may be labels at such outputs.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, torch.Generator], Tensor]
    fisher: Callable[[Tensor, Tensor], Tensor]
    labels: Callable[[Tensor, Tensor], bool] = lambda _z, _t: True


def _are_classes(z: Tensor, t: Tensor) -> bool:
    """Whether there are two or more classes and t holds their numbers or probabilities."""
    if z.ndim < 2 or z.shape[1] < 2:
        return False
    if not t.is_floating_point():
        return True
    sums_to_1 = t.shape == z.shape and float((t.sum(1) - 1).abs().max()) < 1e-4
    return sums_to_1 and bool((t >= 0).all())


def _categorical_score(z: Tensor, t: Tensor) -> Tensor:
    labels = t if t.is_floating_point() else one_hot(t, z.shape[1]).movedim(-1, 1)
    return z.softmax(1) - labels


def _categorical_sample(z: Tensor, generator: torch.Generator) -> Tensor:
    p = z.softmax(1).movedim(1, -1)
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return drawn.reshape(p.shape[:-1])


def _categorical_fisher(z: Tensor, u: Tensor) -> Tensor:
    p = z.softmax(1)
    return p * u - p * (p * u).sum(1, keepdim=True)


def _gaussian_sample(z: Tensor, generator: torch.Generator) -> Tensor:
    return z + torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


LIKELIHOODS = {
    "categorical": Likelihood(
        _categorical_score, _categorical_sample, _categorical_fisher, _are_classes
    ),
    "bernoulli": Likelihood(
        score=lambda z, t: z.sigmoid() - t,
        sample=lambda z, generator: torch.bernoulli(z.sigmoid(), generator=generator),
        fisher=lambda z, u: z.sigmoid() * (1 - z.sigmoid()) * u,
    ),
    "gaussian": Likelihood(
        score=lambda z, t: z - t, sample=_gaussian_sample, fisher=lambda _z, u: u
    ),
}


def likelihood_of(problem: "Problem") -> tuple[Likelihood, float]:
    """The likelihood p and the scale s with loss = s · (-log p).

    Found by comparing scores with the loss's gradient, at the model's outputs and at random ones.

    Raises: ValueError for an unknown name, or a loss that fits no likelihood or several.
    """
    names = [problem.likelihood] if problem.likelihood else list(LIKELIHOODS)
    if unknown := set(names) - set(LIKELIHOODS):
        raise ValueError(f"no likelihood {sorted(unknown)}; known: {list(LIKELIHOODS)}")
    gradient, z, t = _gradients(problem)
    scales = {name: _scale(LIKELIHOODS[name], gradient, z, t) for name in names}
    found = [(LIKELIHOODS[name], scale) for name, scale in scales.items() if scale is not None]
    if len(found) == 1:
        return found[0]
    seen = f"on outputs {(problem.n, *z.shape[1:])} and targets {tuple(problem.targets.shape)}"
    if found:
        fitting = " and ".join(f"'{name}'" for name, scale in scales.items() if scale is not None)
        raise ValueError(f"the loss fits {fitting} {seen}; say which with Problem(likelihood=)")
    tried = " or ".join(f"'{name}'" for name in names)
    raise ValueError(
        f"the loss is no multiple of the negative log-likelihood of {tried} {seen}, so its Fisher "
        f"is not defined; use exact.ggn or exact.empirical_fisher"
    )


def _gradients(problem: "Problem") -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the summed loss, outputs, targets [2n, ...]: the model's outputs, then random.

    Random outputs are in (0, size of the targets), where losses of probabilities are defined too;
    gradients are NaN where the loss is not defined.
    """
    with torch.no_grad():
        z = problem.model(problem.inputs)
    t, slope = problem.targets, torch.func.grad(problem.total_loss)
    drawn = torch.rand(z.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    size = max(1.0, float(t.to(z).abs().max())) if t.shape == z.shape else 1.0
    other = (size * (0.1 + 0.8 * drawn)).to(z)
    try:
        there = slope(other)
    except (RuntimeError, ValueError, AssertionError):  # a loss that asks for a sum of 1, say
        there = torch.full_like(z, torch.nan)
    return torch.cat([slope(z), there]), torch.cat([z, other]), torch.cat([t, t])


def _scale(likelihood: Likelihood, gradient: Tensor, z: Tensor, t: Tensor) -> float | None:
    """The s > 0 with gradient = s · score, None where there is none."""
    if not likelihood.labels(z, t):
        return None
    try:
        score = likelihood.score(z, t)
    except (RuntimeError, IndexError):  # labels of another kind: not this likelihood
        return None
    if score.shape != gradient.shape:
        return None
    scale = (gradient * score).sum() / score.square().sum()
    fits = torch.allclose(
        gradient, scale * score, rtol=1e-4, atol=1e-6 * float(gradient.abs().max())
    )
    return float(scale) if fits and scale > 0 else None
