"""Blocks: named sets of parameters and the order of their entries in vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class Member:
    """The parameters of one module in a block.

    w_bar: side by side as [W, b], [out, in+1], else one after the other, each row-major. rows,
    columns: the part of [W, b] that is meant, None for all.
    """

    module: str
    parameters: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    w_bar: bool = False
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in+1) of the member's [W, b], else (entries, 1)."""
        entries = sum(math.prod(shape) for shape in self.shapes)
        if not self.w_bar:
            return (entries, 1)
        out, width = self.shapes[0][0], entries // self.shapes[0][0]
        ranges = (self.rows or (0, out), self.columns or (0, width))
        rows, columns = (stop - start for start, stop in ranges)
        return (rows, columns)

    @property
    def d(self) -> int:
        """Number of entries."""
        return math.prod(self.matrix_shape)

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """Vector [d] -> {parameter: tensor of its full shape}, zero outside the member's rows."""
        if self.w_bar:
            matrix = v.reshape(self.matrix_shape)
            if self.rows or self.columns:
                out = self.shapes[0][0]
                width = sum(math.prod(shape) for shape in self.shapes) // out
                (top, bottom), (left, right) = self.rows or (0, out), self.columns or (0, width)
                matrix = pad(matrix, (left, width - right, top, out - bottom))
            parts = matrix.split([math.prod(shape[1:]) for shape in self.shapes], dim=1)
        else:
            parts = v.split([math.prod(shape) for shape in self.shapes])
        named = zip(self.parameters, parts, self.shapes, strict=True)
        return {name: part.reshape(shape) for name, part, shape in named}

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        """{parameter: [..., *shape]} -> [..., d]; leading dimensions are kept."""
        named = zip(self.parameters, self.shapes, strict=True)
        if not self.w_bar:
            flat = [tensors[n].reshape(*_lead(tensors[n], s), -1) for n, s in named]
            return torch.cat(flat, dim=-1)
        columns = [tensors[n].reshape(*_lead(tensors[n], s), s[0], -1) for n, s in named]
        return self.cut(torch.cat(columns, dim=-1)).flatten(-2)

    def cut(self, w_bar: Tensor) -> Tensor:
        """The member's part of [..., out, in+1]."""
        w_bar = w_bar[..., slice(*self.rows), :] if self.rows else w_bar
        return w_bar[..., slice(*self.columns)] if self.columns else w_bar


def _lead(tensor: Tensor, shape: tuple[int, ...]) -> torch.Size:
    return tensor.shape[: tensor.ndim - len(shape)]


@dataclass(frozen=True)
class Block:
    """Named set of parameters with d entries, made by `Problem.block` and `Problem.blocks`."""

    name: str
    members: tuple[Member, ...]

    @property
    def d(self) -> int:
        """Number of entries."""
        return sum(member.d for member in self.members)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of its parameters, of which it may hold a part."""
        return tuple(name for member in self.members for name in member.parameters)

    @property
    def single(self) -> Member | None:
        """The only member of a layer, tensor or unit block; None for a group of several."""
        return self.members[0] if len(self.members) == 1 else None

    def split(self, v: Tensor) -> dict[str, Tensor]:
        """Vector [d] -> {parameter: tensor of its full shape}, the sum where members share one."""
        found: dict[str, Tensor] = {}
        parts = v.split([member.d for member in self.members])
        for member, part in zip(self.members, parts, strict=True):
            for name, tensor in member.split(part).items():
                found[name] = found[name] + tensor if name in found else tensor
        return found

    def join(self, tensors: dict[str, Tensor]) -> Tensor:
        """{parameter: [..., *shape]} -> [..., d]."""
        return torch.cat([member.join(tensors) for member in self.members], dim=-1)

    def __str__(self) -> str:
        return f"{self.name} (d = {self.d:,})"


def owner(parameter: str) -> str:
    """Name of the module that a parameter belongs to; "" for the model itself."""
    return parameter.rpartition(".")[0]


def units(layer: Block, module: nn.Module) -> list[Block]:
    """One block per output neuron of a Linear layer, per kernel slice of a convolution.

    A convolution's biases are units of one entry each. A layer without [W, b] stays whole.
    """
    member = layer.members[0]
    if not member.w_bar:
        return [layer]
    out, width = member.matrix_shape
    if isinstance(module, nn.Linear):
        return [_part(layer, f"[{j}]", (j, j + 1), None) for j in range(out)]
    kernel = math.prod(module.kernel_size)  # type: ignore[arg-type]
    bias = member.parameters[-1].endswith("bias")
    starts = range(0, width - bias, kernel)
    slices = [(f"{i}", (start, start + kernel)) for i, start in enumerate(starts)]
    slices += [("bias", (width - 1, width))] * bias
    return [
        _part(layer, f"[{o},{name}]", (o, o + 1), columns)
        for o in range(out)
        for name, columns in slices
    ]


def _part(
    layer: Block, suffix: str, rows: tuple[int, int], columns: tuple[int, int] | None
) -> Block:
    m = layer.members[0]
    part = Member(m.module, m.parameters, m.shapes, True, rows, columns)
    return Block(layer.name + suffix, (part,))
