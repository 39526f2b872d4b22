"""Likelihoods whose negative logarithm a loss can be: score, label sampler, Fisher of the outputs.

The loss may be a multiple s of -log p(t | outputs), such as a mean over output elements. The
curvatures named Fisher are then s times the Fisher information, in the unit of the loss, so that
`exact.fisher` equals `exact.ggn`, as it does for s = 1.
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
    """What is needed of p(t|z) at outputs z [n, ...].

    score(z, t) = -∂ log p(t|z)/∂z; sample(z, generator) draws t; fisher(z, u) = E[score scoreᵀ] u;
    labels(z, t): whether it has labels at such outputs, and t may be such.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, torch.Generator], Tensor]
    fisher: Callable[[Tensor, Tensor], Tensor]
    labels: Callable[[Tensor, Tensor], bool] = lambda _z, _t: True


def _classes_last(z: Tensor) -> Tensor:
    return z.movedim(1, -1)


def _are_classes(z: Tensor, t: Tensor) -> bool:
    """Whether there are two classes at least, and t numbers them or gives their probabilities."""
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
    p = _classes_last(z.softmax(1))
    drawn = torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator)
    return drawn.reshape(p.shape[:-1])


def _categorical_fisher(z: Tensor, u: Tensor) -> Tensor:
    p = z.softmax(1)
    return p * u - p * (p * u).sum(1, keepdim=True)


def _bernoulli_fisher(z: Tensor, u: Tensor) -> Tensor:
    p = z.sigmoid()
    return p * (1 - p) * u


def _gaussian_sample(z: Tensor, generator: torch.Generator) -> Tensor:
    return z + torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)


LIKELIHOODS = {
    "categorical": Likelihood(
        _categorical_score, _categorical_sample, _categorical_fisher, _are_classes
    ),
    "bernoulli": Likelihood(
        score=lambda z, t: z.sigmoid() - t,
        sample=lambda z, generator: torch.bernoulli(z.sigmoid(), generator=generator),
        fisher=_bernoulli_fisher,
    ),
    "gaussian": Likelihood(
        score=lambda z, t: z - t, sample=_gaussian_sample, fisher=lambda _z, u: u
    ),
}


def likelihood_of(problem: "Problem") -> tuple[Likelihood, float]:
    """Return the likelihood of which the problem's loss is s times the negative logarithm, and s.

    Every known likelihood (or the one the problem names) is held against the loss's gradient with
    respect to the outputs, at the model's and at others: few examples fit many by coincidence.

    Raises: ValueError for an unknown name, a loss that is no multiple of the negative logarithm of
        any, or of that of several.
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
    """Gradient of the summed loss, outputs and targets, each [2n, ...]: at the model's outputs z.

    And at random ones of the targets' size, positive and, for targets up to 1, less than 1: there
    losses of probabilities are defined too. NaN where the loss is not.
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
    """Return s with gradient = s · score, or None where there is no such s."""
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
