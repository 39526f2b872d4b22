"""Inputs and back-propagated roots by position, of layers with shared weights.

V_nk = Σ_t b_nkt a_ntᵀ over the positions (or calls) t at which the weight was used; the layer's GGN
or Fisher is (1/N) Σ_n Σ_k vec V_nk vec V_nkᵀ.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..operators.batched import Diagonals, Outer
from ..problem.blocks import Block, Member
from ..problem.problem import Problem
from .backpropagation import LayerRoots, backpropagate
from .layers import layers
from .loss_roots import loss_roots
from .patches import by_position, patches


@dataclass(frozen=True, eq=False)
class Positions:
    """Inputs a [N, T, in+1] and roots b [N, k, T, out] of a layer, by position t."""

    a: Tensor
    b: Tensor


def layer_positions(
    problem: Problem,
    block: Block,
    of: str = "ggn",
    samples: int = 1,
    generator: torch.Generator | None = None,
    *,
    joint: bool = False,
) -> Positions:
    """A layer's a_nt and b_nkt with V_nk = Σ_t b_nkt a_ntᵀ, [out, in+1].

    k: network outputs for "ggn" and "fisher", `samples` for "fisher_mc", 1 for "empirical_fisher";
    fewer with the same Σ_k V Vᵀ behind a narrow layer, unless joint.

    Raises: ValueError for a block that is not a whole Linear, Conv1d or Conv2d layer with one
        group; for of="hessian"; for a loss not convex in the outputs.
    """
    member = _whole_layer(problem, block)
    kept = getattr(problem.recall((of, block)), "positions", None)
    if kept is not None and not joint:
        return kept()
    roots = required_roots(problem, of, samples, generator)
    module = problem.model.get_submodule(member.module)
    chunks = backpropagate(problem, [member.module], roots, joint=joint)
    return joined_positions(module, member, [chunk.layers[member.module] for chunk in chunks])


def required_roots(
    problem: Problem, of: str, samples: int, generator: torch.Generator | None
) -> Diagonals | Outer:
    """The loss roots. Raises: ValueError where there are none."""
    if of == "hessian":
        raise ValueError("a Hessian has no roots by position; use 'ggn', 'fisher', ...")
    if generator is None:
        generator = torch.Generator(problem.inputs.device).manual_seed(0)
    roots = loss_roots(problem, of, samples, generator)
    if roots is None:
        raise ValueError(
            f"the loss is not convex in the outputs, so its {of} has no real root; use "
            f"'empirical_fisher', or exact.{of}, which computes it from products"
        )
    return roots


def joined_positions(module: nn.Module, member: Member, parts: Sequence[LayerRoots]) -> Positions:
    """Positions of all examples, joined; a layer's calls count as positions."""
    a = [torch.cat([patches(module, x)[:, 0] for x in part.x], dim=1) for part in parts]
    b = [
        torch.cat([by_position(module, each, lead=1) for each in part.b], dim=2).movedim(0, 1)
        for part in parts
    ]
    return Positions(torch.cat(a)[..., columns_of(member)], torch.cat(b))


def columns_of(member: Member) -> slice:
    """Columns of [W, b] that the member has: all, the weight's, or the bias's."""
    names = [name.rpartition(".")[2] for name in member.parameters]
    return slice(0 if "weight" in names else -1, None if "bias" in names else -1)


def _whole_layer(problem: Problem, block: Block) -> Member:
    member, known = block.single, layers(problem)
    whole = member is not None and member.w_bar and not (member.rows or member.columns)
    if member is None or not whole or member.module not in known:
        raise ValueError(
            f"block '{block.name}' is no whole Linear, Conv1d or Conv2d layer whose parameters "
            f"act through its outputs alone; such layers here: {list(known)}"
        )
    groups = getattr(problem.model.get_submodule(member.module), "groups", 1)
    if groups != 1:
        raise ValueError(
            f"layer '{block.name}' is a convolution in {groups} groups: its patches differ between "
            f"output channels, so it has no single input factor; exact truths, diagonal, "
            f"low_rank and mini_block_kernel work for it"
        )
    return member
