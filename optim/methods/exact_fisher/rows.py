"""Rows of a batch held by ExactFisher, the Cholesky factor of their Gram matrix, the solve."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...capture.per_example import mean_weight, pieces
from ...core import distributed
from ...core.inversions import Job
from ...core.stacks import Stack
from ...linalg.basics import finite, known_true, per
from ...linalg.sample_space import (
    add_combination_,
    compressed,
    damped_cholesky,
    gram,
    padded,
    projected,
    solved,
)


def woodbury(stack: Stack, M: Tensor) -> Tensor:
    """(M - Σ_n ζ_n V_n) / damping [size, out, in+1], ζ = (K + damping I)⁻¹ t, t_n = ⟨V_n, M⟩."""
    g, x, damping = stack["g"], stack["x"], stack["damping"]
    zeta = solved(stack["L"], over_groups(stack, projected(g, x, M)))
    return add_combination_(M / per(damping, M), g, x, -zeta / damping[:, None])


def room(stack: Stack, rows: dict[Block, tuple[Tensor, Tensor]]) -> tuple[int, int]:
    """Examples and positions per example that these rows and those held need at most."""
    shapes = [g.shape[1:3] for g, _ in rows.values()]
    if "g" in stack:
        shapes.append(stack["g"].shape[1:3])
    return max((m for m, _ in shapes), default=0), max((T for _, T in shapes), default=0)


def make_room(stack: Stack, m: int, T: int) -> None:
    """Widen the held rows to m examples at T positions by zeros, and L to fit."""
    out, columns = stack.shape
    if "L" not in stack:
        stack.hold(g=stack.zeros(m, T, out), x=stack.zeros(m, T, columns), L=stack.zeros(m, m))
        stack.hold(damping=stack.zeros())
        return
    held = stack["L"].shape[-1]
    L = pad(stack["L"], (0, m - held, 0, m - held))
    L.diagonal(dim1=-2, dim2=-1)[:, held:] = 1.0  # any will do: t is zero there
    stack.hold(g=padded(stack["g"], m, T), x=padded(stack["x"], m, T), L=L)


def factorization(stack: Stack, rows: dict[Block, tuple[Tensor, Tensor]]) -> tuple[Job, Tensor]:
    """Job that finds L for these rows, kept if it succeeds; and whose rows are finite, [size] bool.

    Others keep what they have, or begin without curvature.
    """
    m, T = room(stack, rows)
    g = stack.gathered({block: padded(g, m, T) for block, (g, _) in rows.items()})
    x = stack.gathered({block: padded(x, m, T) for block, (_, x) in rows.items()})
    K = over_groups(stack, gram(g, x))
    ok, only = finite(K.diagonal(dim1=-2, dim2=-1)), None
    if not known_true(ok):
        g, x, K = (v.nan_to_num(0.0, 0.0, 0.0).mul_(per(ok, v)) for v in (g, x, K))
        only = ok | (stack["L"][:, 0, 0] == 0)
    damping = stack.group["damping"]
    beside = {"g": g, "x": x, "damping": torch.full_like(K[:, 0, 0], damping)}
    job = Job(stack, "K", "L", damped_cholesky, damping, list(rows), K, beside, only)
    return job, ok


def example_rows(block: Block, totals: Totals, scale: float | None) -> tuple[Tensor, Tensor]:
    """g, x of all examples, g scaled so that F = Σ_n vec V_n (vec V_n)ᵀ is the mean over them.

    scale: what the loss of the data's labels was multiplied with; None for sampled ones.
    Raises: ValueError if calls in one forward saw batches of different sizes.
    """
    weight = mean_weight(totals, scale) ** 0.5
    parts = [compressed(g * weight, x) for x, g in pieces(block, totals)]
    T = max(g.shape[2] for g, _ in parts)
    g = torch.cat([padded(g, g.shape[1], T) for g, _ in parts], 1)
    x = torch.cat([padded(x, x.shape[1], T) for _, x in parts], 1)
    return distributed.gathered(g), distributed.gathered(x)


def over_groups(stack: Stack, values: Tensor) -> Tensor:
    """Each layer's sum over the groups of its convolution, at all of its groups; [size, ...]."""
    if len(stack.blocks) == stack.size:
        return values
    parts = [values[place] for place in stack.places.values()]
    return torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in parts])
