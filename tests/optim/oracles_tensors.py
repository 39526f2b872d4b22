"""Oracles of Shampoo and TNT, which see parameters as tensors and nothing of the layers."""

from functools import reduce
from math import prod

import torch

from tests.optim.oracles_base import Oracle, inverse, kron, parameter_units


def as_tensor(gradient):
    """Convolution weights [O, I/groups, kh, kw] with the kernel as one axis; else as it is."""
    return gradient.flatten(2) if gradient.dim() == 4 else gradient


def contractions(gradient):
    """{i: matrix [n_i, n_i]} of the tensor with itself over all axes but i."""
    found = {}
    for i in range(gradient.dim()):
        unfolded = gradient.movedim(i, 0).reshape(gradient.shape[i], -1)
        found[i] = unfolded @ unfolded.mT
    return found


def kron_all(factors):
    return reduce(kron, factors)


def power(H, exponent):
    """H^exponent; an eigenvalue that is rounding is zero, for roots would blow it up."""
    values, U = torch.linalg.eigh(H)
    rounding = len(H) * torch.finfo(H.dtype).eps * values.max()
    return U @ torch.diag(torch.where(values > rounding, values, 0.0) ** exponent) @ U.mT


class Shampoo(Oracle):
    """H_i of the mini-batch gradient, (H_i + damping I)^(-1/(2k)) on axis i of k (section 8).

    With coupled weight decay the gradient contains it. Warmed up, it learns nothing at step 0.
    """

    heavy_ball = True
    decoupled = True
    rests_when_warm = True
    units_of = staticmethod(parameter_units)

    def __init__(self, model, loss, *, refresh_early=False, **settings):
        super().__init__(model, loss, **settings)
        self.refresh_early = refresh_early

    def statistics(self, seen, score):  # noqa: ARG002
        of, tau, new = seen.gradient(), 0.0 if self.decoupled else self.weight_decay, {}
        for key, unit in self.units.items():
            (p,) = unit.parameters
            new[key] = contractions(as_tensor(of(p) + tau * p.detach()))
        return new

    def due(self):
        early = self.refresh_early and self.k < self.refresh_every
        return early or self.k % self.refresh_every == 0

    def dense_curvature(self, own):
        """The power +1/(2k) of each H_i, whose product stands for the curvature."""
        return kron_all(power(H, 0.5 / len(own)) for H in own.values())

    def dense_inverse(self, own):
        damped = [H + self.damping * torch.eye(len(H), dtype=H.dtype) for H in own.values()]
        return kron_all(power(H, -0.5 / len(own)) for H in damped)


class TNT(Oracle):
    """⊗ U_i, covariance of the sampled mini-batch-mean gradient (section 9); plain inverses."""

    heavy_ball = True
    decoupled = True
    units_of = staticmethod(parameter_units)

    def statistics(self, seen, score):
        of, new = seen.gradient(score), {}
        for key, unit in self.units.items():
            (p,) = unit.parameters
            new[key] = contractions(as_tensor(of(p)))
        return new

    def due(self):
        return self.k < self.refresh_every or self.k % self.refresh_every == 0

    @staticmethod
    def covariances(own):
        """U_i = H_i / (c^(k-1) prod_{j≠i} n_j), c = (T/N)^(1/k): equal mean eigenvalues c."""
        sizes, k = [len(H) for H in own.values()], len(own)
        c = (own[0].trace() / prod(sizes)) ** (1 / k)
        return [H / (c ** (k - 1) * prod(sizes) / len(H)) for H in own.values()]

    def dense_curvature(self, own):
        return kron_all(self.covariances(own))

    def dense_inverse(self, own):
        return kron_all(inverse(U, self.damping) for U in self.covariances(own))
