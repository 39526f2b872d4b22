"""Diagnostics by layer: sharpness of each Kronecker factor, dampings and pairs of K-BFGS.

Of a Kronecker preconditioner H_g ⊗ H_a the greatest eigenvalue of each factor times what it is to
be the inverse of; of K-BFGS also how often its dampings fired, and what its pairs say of the
curvature before and after they are averaged. Of fully connected layers with a bias that are used
once per example; nothing is said of others.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kronscope.diag import Block, Dense, Kronecker, Operator, Problem
from kronscope.diag.backward import layers, recording
from kronscope.optim.methods.kbfgs import COUNTS

from .edge_of_stability import Observed, PrincipalBlock, Record, Searches, row

MET = ("H_g accepted", "H_g skipped")
FIRED = ("H_g skipped", "Powell fired", "second damping fired")

Pair = tuple[Tensor, Tensor]
Moments = dict[Block, tuple[Operator, Operator]]


def factors(view: Observed, found: Moments, searches: Searches) -> Iterator[Record]:
    """left_sharpness λ_max(H_g G) and right_sharpness λ_max(H_a A); 1 for exact inverses.

    found: G and A as `moments` returns them. If the layer's block were G ⊗ A, its sharpness would
    be lr times the product of the two.
    """
    for block, (G, A) in found.items():
        P = view.P[block.name]
        if isinstance(P, Kronecker):
            left = searches.value((block.name, "left"), G, P.left.__matmul__)
            right = searches.value((block.name, "right"), A, P.right.__matmul__)
            own = {"block": block.name, "size": block.d}
            yield row("left_sharpness", left, truth="hessian", **own)
            yield row("right_sharpness", right, **own)


def moments(view: Observed) -> Moments:
    """G = E[∂²ℓ/∂z∂z] [out, out] and A = E[ã ãᵀ] [in+1, in+1] of each measured layer.

    G by its products, as the Hessian of the biases.
    """
    A, found = input_moments(view.problem), Moments()
    for block, at in view.places():
        if block.name in A:
            out, width = block.members[0].matrix_shape
            biases = slice(at + width - 1, at + out * width, width)
            found[block] = PrincipalBlock(view.C["hessian"], biases), Dense(A[block.name])
    return found


def input_moments(problem: Problem) -> dict[str, Tensor]:
    """E[ã ãᵀ], ã an input and 1, [in+1, in+1], by layer."""
    model = problem.model
    once = [name for name, layer in layers(problem).items() if layer.rows]
    modules = {name: model.get_submodule(name) for name in once}
    names = [n for n, m in modules.items() if isinstance(m, nn.Linear) and m.bias is not None]
    with recording(model, names) as calls:
        model(problem.inputs)
    inputs = {name: pad(calls[name][0].x, (0, 1), value=1.0) for name in names}
    return {name: a.T @ a / problem.n for name, a in inputs.items()}


class Pairs:
    """The last pairs (s, y) of K-BFGS and counts of its dampings, followed step by step."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.averaged: dict[str, Pair] = {}
        self.last: dict[str, Pair] = {}
        self.counts: dict[str, Tensor] = {}

    def look(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Call after every step: recovers the step's own pair from the change of the averages."""
        for name, state in states.items():
            if "y" in state and state["y"].dim() == 1:
                new = s, y = state["s"].clone(), state["y"].clone()
                if all(map(torch.equal, new, self.averaged.get(name, (y[:0], y[:0])))):
                    continue  # a step that updated nothing
                s_before, y_before = self.averaged.get(name, (0.0, 0.0))
                fresh = 1 - self.decay
                self.last[name] = (
                    (s - self.decay * s_before) / fresh,
                    (y - self.decay * y_before) / fresh,
                )
                self.averaged[name] = new

    def fired(self, view: Observed) -> Iterator[Record]:
        """Share of the pairs since the last call on which each damping fired."""
        for block in view.layers:
            if block.name in self.last:
                now = view.states[block.name]["counts"].clone()
                new = now - self.counts.get(block.name, torch.zeros_like(now))
                self.counts[block.name] = now
                pairs = sum(int(new[COUNTS.index(what)]) for what in MET)
                for what in FIRED:
                    share = int(new[COUNTS.index(what)]) / pairs if pairs else math.nan
                    name = what.lower().replace(" ", "_")
                    yield row(name, share, block=block.name, size=block.d)

    def quality(self, found: Moments) -> Iterator[Record]:
        """pair_curvature s·y / s·Gs and pair_cosine of y and Gs; both 1 for a pair exact for G."""
        for block, (G, _) in found.items():
            if block.name in self.last:
                own = {"block": block.name, "size": block.d, "truth": "hessian"}
                pairs = {"pair": self.last[block.name], "averaged pair": self.averaged[block.name]}
                for which, (s, y) in pairs.items():
                    told = G @ s
                    curvature = ((s @ y) / (s @ told)).item()
                    cosine = torch.cosine_similarity(y, told, dim=0).item()
                    yield row("pair_curvature", curvature, approximation=which, **own)
                    yield row("pair_cosine", cosine, approximation=which, **own)
