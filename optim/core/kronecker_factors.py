"""Kronecker factors A = E_n[Σ_t ã ãᵀ] and G = E_n[(1/T) Σ_t g gᵀ], g of the per-example loss.

A is a SUM over the positions that share the weights, G a MEAN (KFC, arXiv:1602.01407).
"""

from torch import Tensor

from ..blocks.blocks import Block
from ..capture import positions
from ..capture.capture import Accumulate, Call, Totals, once
from ..linalg.basics import finite_moments, learn_
from ..linalg.products import gram_, second_moment
from .stacks import Stack


def add_input_moment(totals: Totals, call: Call) -> None:
    """means["A"]: mean over rows of ã ãᵀ, [groups, in+1, in+1]."""
    totals.means["A"], _ = input_moment(totals.means.get("A"), call.block, call.x, seen=totals.rows)


def input_moment(mean: Tensor | None, block: Block, x: Tensor, *, seen: int) -> tuple[Tensor, int]:
    """Mean over rows of ã ãᵀ joined to that of `seen` earlier ones; how many there are now."""
    for piece in positions.pieces(block, x):
        a = positions.inputs(block, piece).flatten(1, 2)
        mean = second_moment(mean, a, seen, ones=block.bias is not None)
        seen += a.shape[1]
    assert mean is not None
    return mean, seen


def sampled_factors(totals: Totals, call: Call, _: Tensor) -> None:
    """Means over rows of ã ãᵀ and of g gᵀ [groups, out, out], g of labels drawn from the model."""
    if call.counted:
        return
    assert call.g is not None
    add_input_moment(totals, call)
    g = call.gradients(call.g).flatten(1, 2)
    totals.means["G"] = second_moment(totals.means.get("G"), g, totals.rows, ones=False)


def empirical_factors(totals: Totals, call: Call, delivered: Tensor) -> None:
    """As above, with the data's own labels, from what backward delivers under a mean loss.

    delivered = g_n / M for M examples in all micro-batches, which step() knows: the sum of
    delivered deliveredᵀ is kept.
    """
    once(call)
    add_input_moment(totals, call)
    g = call.gradients(delivered).flatten(1, 2)
    GG = totals.means.setdefault("GG", g.new_zeros(len(g), g.shape[2], g.shape[2]))
    gram_(GG, g, beta=1.0, alpha=1.0)


def factors_of(likelihood: str) -> Accumulate:
    """Which of the two: by the data's labels for "empirical", else by sampled ones."""
    return empirical_factors if likelihood == "empirical" else sampled_factors


def input_factor(totals: Totals) -> Tensor:
    """A [groups, in+1, in+1], summed over positions; spoils the totals."""
    A = totals.means["A"]
    return A if totals.rows == totals.examples else A.mul_(totals.positions)


def output_factor(totals: Totals, scale: float) -> Tensor:
    """G [groups, out, out]; scale: what the loss was multiplied with. Spoils the totals."""
    if "G" in totals.means:
        return totals.means["G"]
    return totals.means["GG"].mul_((totals.examples / scale) ** 2 / totals.rows)


def learn_factors(
    stack: Stack, totals: dict[Block, Totals], scale: float, weight: float | Tensor | None = None
) -> Tensor:
    """A <- (1 - weight) A + weight A_k and G likewise, as `learn_moments`.

    weight: of the new, a number or [size]; 1 - decay unless given.
    """
    weight = 1 - stack.group["decay"] if weight is None else weight
    return learn_moments(stack, stack.mask(totals), weight, **_factors(stack, totals, scale))


def warm_factors(stack: Stack, totals: dict[Block, Totals], batch: int, scale: float = 1.0) -> None:
    """A and G as running means over the batches of warm_up; this is number `batch`, from 1."""
    warm_moments(stack, batch, **_factors(stack, totals, scale))


def _factors(stack: Stack, totals: dict[Block, Totals], scale: float) -> dict[str, Tensor]:
    A = stack.gathered({block: input_factor(t) for block, t in totals.items()})
    G = stack.gathered({block: output_factor(t, scale) for block, t in totals.items()})
    return {"A": A, "G": G}


def learn_moments(stack: Stack, mask: Tensor, weight: float | Tensor, **moments: Tensor) -> Tensor:
    """Each average <- (1 - weight) average + weight moment, unless one of them is not finite.

    moments: [size, ..., n, n] by name; averages begin at zero. weight: a number or [size].

    Returns: which of the mask learned, [size] bool.
    """
    for name, M in moments.items():
        if name not in stack:
            stack.hold(**{name: stack.zeros(*M.shape[1:])})
    ok = finite_moments(mask, *moments.values())
    for name, M in moments.items():
        learn_(stack[name], M, weight, ok)
    return ok


def warm_moments(stack: Stack, batch: int, **moments: Tensor) -> None:
    """Means over the batches of warm_up; these moments are of number `batch`, from 1."""
    for name, M in moments.items():
        if batch == 1:
            stack.hold(**{name: M.clone()})
        else:
            stack[name].lerp_(M, 1 / batch)
