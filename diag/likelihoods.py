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
    from diag.problem import Problem


@dataclass(frozen=True)
class Likelihood:
    """What is needed of p(t|z) at outputs z [n, ...].

    score(z, t) = -∂ log p(t|z)/∂z; sample(z, generator) draws t; fisher(z, u) = E[score scoreᵀ] u.
    """

    score: Callable[[Tensor, Tensor], Tensor]
    sample: Callable[[Tensor, torch.Generator], Tensor]
    fisher: Callable[[Tensor, Tensor], Tensor]


def _classes_last(z: Tensor) -> Tensor:
    return z.movedim(1, -1)


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
    "categorical": Likelihood(_categorical_score, _categorical_sample, _categorical_fisher),
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
    respect to the outputs.

    Raises: ValueError for an unknown name or a loss that is no multiple of the negative logarithm.
    """
    names = [problem.likelihood] if problem.likelihood else list(LIKELIHOODS)
    if unknown := set(names) - set(LIKELIHOODS):
        raise ValueError(f"no likelihood {sorted(unknown)}; known: {list(LIKELIHOODS)}")
    with torch.no_grad():
        z = problem.model(problem.inputs)
    gradient = torch.func.grad(problem.total_loss)(z)
    for name in names:
        scale = _scale(LIKELIHOODS[name], gradient, z, problem.targets)
        if scale is not None:
            return LIKELIHOODS[name], scale
    tried = " or ".join(f"'{name}'" for name in names)
    raise ValueError(
        f"the loss is no multiple of the negative log-likelihood of {tried} on these outputs "
        f"{tuple(z.shape)} and targets {tuple(problem.targets.shape)}, so its Fisher is not "
        f"defined; use exact.ggn or exact.empirical_fisher"
    )


def _scale(likelihood: Likelihood, gradient: Tensor, z: Tensor, t: Tensor) -> float | None:
    """Return s with gradient = s · score, or None where there is no such s."""
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
