"""Likelihoods of the labels given the model outputs: sampling, score and Fisher matrix."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Generator, Tensor


class Likelihood(NamedTuple):
    """sample(output, generator) -> labels; score(output, labels) -> like output.

    The score is d(-log p(label | output)) / d output for each example, not divided by the batch.
    """

    sample: Callable[[Tensor, Generator], Tensor]
    score: Callable[[Tensor, Tensor], Tensor]


def sample_categorical(output: Tensor, generator: Generator) -> Tensor:
    """One class index [m, ...] per example from softmax over dimension 1 of [m, c, ...]."""
    p = output.softmax(1)
    # the race of exponential clocks that torch.multinomial runs, which however refuses NaN
    # (and on a GPU aborts the process); here NaN gives some label and a NaN score
    clocks = torch.empty_like(p).exponential_(generator=generator)
    return (p / clocks).argmax(1)


def score_categorical(output: Tensor, labels: Tensor) -> Tensor:
    """softmax(output) - onehot(labels), the gradient of the cross-entropy summed over positions.

    By hand, two equally likely classes:
        >>> score_categorical(torch.zeros(1, 2), torch.tensor([0])).tolist()
        [[-0.5, 0.5]]
    """
    p = output.softmax(1)
    return p - torch.zeros_like(p).scatter_(1, labels.unsqueeze(1), 1.0)


def sample_bernoulli(output: Tensor, generator: Generator) -> Tensor:
    """0 or 1 per entry of the logits, with P(1) = sigmoid(logit)."""
    p = output.sigmoid()
    uniform = torch.empty_like(p).uniform_(generator=generator)
    return (uniform < p).to(p.dtype)  # torch.bernoulli refuses NaN


def score_bernoulli(output: Tensor, labels: Tensor) -> Tensor:
    """sigmoid(output) - labels: binary cross-entropy with logits, summed over entries."""
    return output.sigmoid() - labels


def sample_gaussian(output: Tensor, generator: Generator) -> Tensor:
    """Normal(output, 1) per entry, the model behind the loss ½ ‖output - label‖²."""
    noise = torch.empty_like(output).normal_(generator=generator)
    return output + noise


def score_gaussian(output: Tensor, labels: Tensor) -> Tensor:
    """Output minus labels, the gradient of ½ ‖output - labels‖².

    The loss without the ½ has twice this Fisher matrix (2 I at the output): put the ½ in the
    loss, or double the damping and halve the learning rate in your mind.
    """
    return output - labels


LIKELIHOODS = {
    "categorical": Likelihood(sample_categorical, score_categorical),
    "bernoulli": Likelihood(sample_bernoulli, score_bernoulli),
    "gaussian": Likelihood(sample_gaussian, score_gaussian),
}


def fits(name: str, output: Tensor) -> None:
    """Raise ValueError unless an output of this shape can stand for the likelihood."""
    least = 2 if name == "categorical" else 1
    if output.ndim < least:
        wanted = "[batch, classes, ...]" if least == 2 else "[batch, ...]"
        raise ValueError(
            f"likelihood='{name}' needs an output {wanted} of the model, got {list(output.shape)}"
        )


def sampled_score(name: str, output: Tensor, generator: Generator) -> Tensor:
    """Score of one label per example drawn from the model's own distribution.

    Returns: like output, in at least float32.
    """
    likelihood = LIKELIHOODS[name]
    output = output.float() if output.dtype in (torch.float16, torch.bfloat16) else output
    return likelihood.score(output, likelihood.sample(output, generator))


def fisher_categorical(output: Tensor, u: Tensor) -> Tensor:
    """(diag(p) - p pᵀ) u of each example, p = softmax over dimension 1 of [m, c, ...].

    By hand, two equally likely classes:
        >>> fisher_categorical(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]])).tolist()
        [[0.25, -0.25]]
    """
    p = output.softmax(1)
    pu = p * u
    return pu - p * pu.sum(1, keepdim=True)


def fisher_bernoulli(output: Tensor, u: Tensor) -> Tensor:
    """Each entry of u times p (1 - p), p = sigmoid(output)."""
    p = output.sigmoid()
    return p * (1 - p) * u


def fisher_gaussian(output: Tensor, u: Tensor) -> Tensor:
    """Unit variance, for ½ ‖output - label‖²: u itself."""
    del output
    return u


FISHER: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": fisher_categorical,
    "bernoulli": fisher_bernoulli,
    "gaussian": fisher_gaussian,
}
