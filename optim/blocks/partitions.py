"""Partitions of a model's parameters into the blocks of a block-diagonal curvature."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .blocks import layers_of

Names = Sequence[Sequence[str]]
Blocks = Names | Callable[[nn.Module], Names] | None


@dataclass(frozen=True, eq=False)
class Part:
    """Parameters that are solved for together, in the model's order."""

    name: str
    parameters: list[Tensor]

    @property
    def treatments(self) -> dict[Tensor, str]:
        """How each parameter is trained, in words."""
        return dict.fromkeys(self.parameters, f"block {self.name}")


def partition(model: nn.Module, parameters: Iterable[Tensor], blocks: Blocks) -> list[Part]:
    """The parameters in parts.

    blocks: None is one part of all. Else each entry gives the module names of one part ("" is the
    model itself); a name stands for all parameters inside that module. A layer that no entry names
    is a part by itself. A function makes such a list from the model.

    Raises: ValueError for an unknown name, an empty part, or one that overlaps another.
    """
    left = dict.fromkeys(parameters)
    if blocks is None:
        return [Part("model", list(left))]
    parts: list[Part] = []
    for names in blocks(model) if callable(blocks) else blocks:
        wanted = _inside(model, names)
        own = [p for p in left if p in wanted]
        _disjoint(names, own, wanted, parts)
        for parameter in own:
            del left[parameter]
        parts.append(Part("+".join(names) or "model", own))
    return parts + [Part(layer.name, layer.parameters) for layer in layers_of(model, left)]


def _inside(model: nn.Module, names: Sequence[str]) -> set[Tensor]:
    """Parameters of the named modules."""
    if isinstance(names, str):
        raise ValueError(f"each block is a sequence of module names, not the string {names!r}")
    if not names:
        raise ValueError("an empty block; give module names, or leave it out")
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        known = [name for name, module in modules.items() if name and list(module.parameters())]
        raise ValueError(f"no modules {unknown} in {type(model).__name__}; known: {known}")
    return {p for name in names for p in modules[name].parameters()}


def _disjoint(
    names: Sequence[str], own: list[Tensor], wanted: set[Tensor], parts: list[Part]
) -> None:
    others = [part.name for part in parts if wanted.intersection(part.parameters)]
    if others:
        raise ValueError(f"block {list(names)} overlaps {others}: each parameter belongs to one")
    if not own:
        raise ValueError(f"block {list(names)} holds no parameter that this optimizer trains")
