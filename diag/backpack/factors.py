"""Input factors on [W, b] of Kronecker products; BackPACK has them for the weight alone."""

import torch
from backpack.utils.conv import unfold_input
from torch import Tensor, nn

from ..problem import Block, Member, Problem
from .support import Extension, UnsupportedError, owners


def matrix_layer(problem: Problem, block: Block, extension: Extension) -> Member:
    """Member of a block that is one layer with [W, b] whose outputs share their inputs.

    Raises: UnsupportedError for any other block, or parameters that another module has too.
    """
    member, asked_by = block.single, type(extension).__name__
    if member is None or not member.w_bar:
        kinds = [type(problem.model.get_submodule(m.module)).__name__ for m in block.members]
        raise UnsupportedError(
            f"{asked_by} needs a block of one Linear or Conv layer; block '{block.name}' is "
            f"{' + '.join(kinds)}; diagonal and the exact truths work for every block"
        )
    owners(problem.model, block.parameters, extension)  # refuses what it does not know
    groups = getattr(problem.model.get_submodule(member.module), "groups", 1)
    if groups != 1:
        raise UnsupportedError(
            f"layer '{member.module}' has groups={groups}: its output channels see different "
            f"inputs, so {asked_by} has no one input factor; diagonal and the exact truths work "
            f"for every block"
        )
    return member


def shared_shift(problem: Problem, member: Member) -> Block:
    """Block of the layer's bias, a shift of its outputs; without a bias, of the member."""
    name = f"{member.module}.bias".lstrip(".")
    if name not in problem.trainable:
        return Block(member.module, (member,))
    shape = tuple(problem.model.get_parameter(name).shape)
    return Block(name, (Member(member.module, (name,), (shape,), w_bar=True),))


def input_factor(problem: Problem, member: Member) -> tuple[Tensor, int]:
    """A [in+1, in+1] = mean_n Σ_t a_t a_tᵀ of a layer's inputs with 1 appended, and T.

    Only the columns of the parameters the member has: without bias [in, in], bias alone [1, 1].
    """
    layer = problem.model.get_submodule(member.module)
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _layer, args: seen.append(args[0]))
    try:
        with torch.no_grad():
            problem.model(problem.inputs)
    finally:
        handle.remove()
    x = seen[0]
    columns = x[:, :, None] if isinstance(layer, nn.Linear) else unfold_input(layer, x)
    ones = columns.new_ones(len(columns), 1, columns.shape[2])
    names = [name.rpartition(".")[2] for name in member.parameters]
    a = torch.cat([columns] * ("weight" in names) + [ones] * ("bias" in names), dim=1)
    return torch.einsum("nit,njt->ij", a, a) / len(a), a.shape[2]
