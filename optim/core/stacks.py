"""Batched state of layers of equal shape: one batched product serves them all."""

from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..blocks.blocks import Block
from ..linalg.basics import factor_dtype


class Stack:
    """Blocks of one shape, dtype, device, kind of layer and parameter group.

    shape: (out, in+1) of each of the `size` matrices: one for each layer, and for each group of a
    grouped convolution. group: the parameter group of the weights. states: optimizer.state, where
    each started block's views appear under its weight.
    """

    def __init__(self, blocks: list[Block], group: dict[str, Any], states: MutableMapping) -> None:
        self.blocks, self.group = blocks, group
        self.shape = blocks[0].shape
        self.convolutional = blocks[0].convolutional
        self.dtype, self.device = factor_dtype(blocks[0].weight), blocks[0].weight.device
        self.places: dict[Block, slice] = {}
        self.size = 0
        for block in blocks:
            self.places[block] = slice(self.size, self.size + block.groups)
            self.size += block.groups
        self.started: list[Block] = []
        self.tensors: dict[str, Tensor] = {}
        self.solved: dict[str, set[Block]] = {}  # who has a result of this name
        self._states = states
        self._masks: dict[tuple[bool, ...], Tensor] = {}

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Zeros [size, *shape] of the stack's precision."""
        return torch.zeros(self.size, *shape, dtype=dtype or self.dtype, device=self.device)

    def eyes(self, n: int) -> Tensor:
        """Identity matrices [size, n, n]."""
        eye = torch.eye(n, dtype=self.dtype, device=self.device)
        return eye.repeat(self.size, 1, 1)

    def hold(self, **tensors: Tensor) -> None:
        """Keep these tensors [size, ...] and show every started block its part.

        One already held is overwritten in place, unless its shape changes: views stay live.
        """
        for key, tensor in tensors.items():
            if key in self.tensors and self.tensors[key].shape == tensor.shape:
                self.tensors[key].copy_(tensor)
            else:
                # as a loaded one will be: products round differently in another layout
                self.tensors[key] = tensor.contiguous()
        self._show(self.started, tensors)

    def start(self, blocks: Iterable[Block]) -> list[Block]:
        """Show these blocks' views from now on; those among them for which that is new."""
        new = [block for block in blocks if block not in self.started]
        self.started += new
        self._show(new, self.tensors)
        return new

    def of(self, block: Block, key: str) -> Tensor:
        """A block's part of a tensor, [groups, ...]."""
        return self.tensors[key][self.places[block]]

    def gathered(self, parts: Mapping[Block, Tensor]) -> Tensor:
        """One tensor [size, ...] of the blocks' parts [groups, ...], zero for blocks without.

        A stack of one block gives that part itself, not a copy.
        """
        if len(self.blocks) == 1:
            return parts[self.blocks[0]]
        shape = next(iter(parts.values())).shape[1:]
        missing = {b: self.zeros(*shape)[: b.groups] for b in self.blocks if b not in parts}
        return torch.cat([parts[b] if b in parts else missing[b] for b in self.blocks])

    def mask(self, blocks: Iterable[Block]) -> Tensor:
        """Which matrices belong to these blocks, [size] bool; made once per choice of blocks."""
        chosen = set(blocks)
        key = tuple(block in chosen for block in self.blocks)
        if key not in self._masks:
            flags = [
                flag for b, flag in zip(self.blocks, key, strict=True) for _ in range(b.groups)
            ]
            self._masks[key] = torch.tensor(flags, device=self.device)
        return self._masks[key]

    def adopt(self) -> None:
        """Take over what a loaded state_dict put into `states`, bit for bit, as views again."""
        loaded = {
            b: dict(self._states[b.weight]) for b in self.blocks if self._states.get(b.weight)
        }
        self.started = []
        keys = {key for entries in loaded.values() for key in entries}
        self.tensors = {key: old for key, old in self.tensors.items() if key in keys}
        for block, entries in loaded.items():
            for key, value in entries.items():
                if key not in self.tensors:
                    shape = value.shape[block.groups > 1 :]
                    dtype = self.dtype if value.is_floating_point() else value.dtype
                    self.tensors[key] = self.zeros(*shape, dtype=dtype)
                self.of(block, key).copy_(value.reshape(self.of(block, key).shape))
        for key in keys:
            self.solved[key] = {block for block, entries in loaded.items() if key in entries}
        self.start(loaded)

    def _show(self, blocks: Iterable[Block], tensors: Iterable[str]) -> None:
        for block in blocks:
            state = self._states[block.weight]
            for key in tensors:
                part = self.of(block, key)
                state[key] = part[0] if block.groups == 1 else part


def make_stacks(blocks: Iterable[Block], groups: list[dict], states: MutableMapping) -> list[Stack]:
    """The blocks sorted into stacks, in the order of the first block of each."""
    where = {p: i for i, group in enumerate(groups) for p in group["params"]}
    found: dict[tuple, list[Block]] = {}
    for block in blocks:
        W = block.weight
        key = (block.kind, block.shape, W.dtype, W.device, where[W])
        found.setdefault(key, []).append(block)
    return [Stack(members, groups[key[-1]], states) for key, members in found.items()]
