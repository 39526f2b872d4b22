"""Truths of many blocks from one back-propagation of the loss roots."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..backward.backpropagation import Chunk, LayerRoots, backpropagate, count
from ..backward.layers import QualifiedLayer, layers
from ..backward.patches import by_position, patches, per_group
from ..backward.per_example import per_example_roots
from ..backward.positions import columns_of, joined_positions
from ..operators.batched import BatchedSymmetric, Diagonals, Outer, Packed, empty, pack
from ..problem.blocks import Block, Member
from ..problem.problem import Problem
from .kronecker_terms import KroneckerTerms
from .low_rank_terms import LowRankTerms


def by_rows(problem: Problem, block: Block) -> QualifiedLayer | None:
    """The layer with one row per example whose [W, b], or some rows of it, the block is, if any."""
    member = block.single
    if member is None or not member.w_bar or member.columns:
        return None
    layer = layers(problem).get(member.module)
    return layer if layer is not None and layer.rows else None


def size_in_bytes(problem: Problem, block: Block, roots: Diagonals | Outer) -> int:
    """Memory of a block's truth assembled from these roots."""
    each, k = problem.model.get_parameter(block.parameters[0]).element_size(), count(roots)
    if by_rows(problem, block) is None:
        positions = (
            layers(problem)[block.members[0].module].floats if _by_position(problem, block) else 0
        )
        return each * problem.n * k * (block.d + positions)
    o, i = block.members[0].matrix_shape
    return each * problem.n * (i + (k * o if 4 * k**2 <= o else o * (o + 1) // 2))


def assembled(
    problem: Problem, blocks: Sequence[Block], roots: Diagonals | Outer
) -> dict[Block, KroneckerTerms | LowRankTerms]:
    """The truths of the blocks from the loss roots."""
    seen_by = {block: by_rows(problem, block) for block in blocks}
    collectors = {
        block: _Columns(problem, block) if layer is None else _Rows(problem, block, layer, roots)
        for block, layer in seen_by.items()
    }
    joint = any(len(block.members) > 1 for block in blocks)
    return _collected(problem, collectors, roots, joint=joint)


def columns(
    problem: Problem, blocks: Sequence[Block], roots: Diagonals | Outer
) -> dict[Block, LowRankTerms]:
    """Every block as LowRankTerms V [N, k, d]; V_aᵀ V_b is then the block between a and b."""
    collectors = {block: _Columns(problem, block) for block in blocks}
    return _collected(problem, collectors, roots, joint=True)


def _collected(
    problem: Problem, collectors: dict, roots: Diagonals | Outer, *, joint: bool
) -> dict:
    """One back-propagation whose results go to every block's collector."""
    known = layers(problem)
    members = [member for block in collectors for member in block.members]
    names = {m.module for m in members if _by_layer(problem, m)}
    others = sorted({n for m in members if m.module not in names for n in m.parameters})
    for chunk in backpropagate(problem, [n for n in known if n in names], roots, joint=joint):
        pulled = per_example_roots(problem, others, chunk.rows, chunk.roots) if others else {}
        for collector in collectors.values():
            collector.add(chunk, pulled)
    return {block: collector.finish() for block, collector in collectors.items()}


def layer_inputs(problem: Problem, member: Member) -> Tensor:
    """The inputs a [N, in+1] of a layer that sees one row per example."""
    module = problem.model.get_submodule(member.module)
    seen: list[Tensor] = []
    handle = module.register_forward_hook(lambda _m, args, _z: seen.append(args[0].detach()))
    try:
        with torch.no_grad():
            problem.model(problem.inputs)
    finally:
        handle.remove()
    return patches(module, seen[0])[:, 0, 0, columns_of(member)]


def _by_layer(problem: Problem, member: Member) -> bool:
    return member.w_bar and member.module in layers(problem)


class _Rows:
    """Collector of KroneckerTerms: inputs, and curvatures at the outputs in the smallest form."""

    def __init__(
        self, problem: Problem, block: Block, layer: QualifiedLayer, roots: Diagonals | Outer
    ) -> None:
        self.member, self.n = block.members[0], problem.n
        self.module = problem.model.get_submodule(self.member.module)
        self.outputs = slice(*self.member.rows) if self.member.rows else slice(None)
        self.values: Tensor | None = None
        if layer.last and isinstance(roots, Diagonals):
            self.values = roots.values[:, self.outputs]
        self.a: list[Tensor] = []
        self.roots: list[Tensor] = []
        self.packed: Tensor | None = None

    def add(self, chunk: Chunk, _pulled: dict[str, Tensor]) -> None:
        """Add a chunk of examples."""
        found = chunk.layers[self.member.module]
        self.a.append(patches(self.module, found.x[0])[:, 0, 0, columns_of(self.member)])
        if self.values is not None:
            return
        roots = found.b[0][:, :, self.outputs].movedim(0, 1)  # [n, k, o]
        _, k, o = roots.shape
        if 4 * k**2 <= o:  # roots take less arithmetic than matrices, and less room
            self.roots.append(roots.clone())
            return
        if self.packed is None:
            self.packed = empty(roots, self.n, o * (o + 1) // 2)
        self.packed[chunk.rows] = pack(roots.mT @ roots)

    def finish(self) -> KroneckerTerms:
        """The operator of all chunks."""
        if self.values is not None:
            left: BatchedSymmetric = Diagonals(self.values)
        elif self.packed is not None:
            left = Packed.consume(self.packed, self.member.matrix_shape[0])
        else:
            left = Outer(torch.cat(self.roots))
        return KroneckerTerms(torch.cat(self.a), left)


class _Columns:
    """Collector of LowRankTerms: each example's columns, member after member."""

    def __init__(self, problem: Problem, block: Block) -> None:
        self.problem, self.block = problem, block
        self.V: list[Tensor] = []
        self.returned: list[LayerRoots] = []
        self.by_position = _by_position(problem, block)

    def add(self, chunk: Chunk, pulled: dict[str, Tensor]) -> None:
        """Add a chunk of examples."""
        found = [self._member(member, chunk, pulled) for member in self.block.members]
        self.V.append(torch.cat(found, dim=2).movedim(0, 1).contiguous())
        if self.by_position:
            self.returned.append(chunk.layers[self.block.members[0].module])

    def _member(self, member: Member, chunk: Chunk, pulled: dict[str, Tensor]) -> Tensor:
        """V [k, n, d] of one member."""
        if member.module not in chunk.layers:
            return member.join(pulled)
        module = self.problem.model.get_submodule(member.module)
        found = chunk.layers[member.module]
        pairs = zip(found.x, found.b, strict=True)
        w_bar = torch.stack([_products(module, x, b) for x, b in pairs]).sum(0)
        return member.cut(w_bar[..., columns_of(member)]).flatten(2)

    def finish(self) -> LowRankTerms:
        """The operator of all chunks."""
        member = self.block.single
        sizes = member.matrix_shape if member is not None and member.w_bar else None
        if not self.by_position:
            return LowRankTerms(torch.cat(self.V), None, sizes)
        assert member is not None
        module = self.problem.model.get_submodule(member.module)
        positions = partial(joined_positions, module, member, self.returned)
        return LowRankTerms(torch.cat(self.V), positions, sizes)


def _by_position(problem: Problem, block: Block) -> bool:
    """Whether the block is a whole layer whose patches are the same for all its outputs."""
    member = block.single
    if member is None or member.rows or member.columns or not _by_layer(problem, member):
        return False
    return getattr(problem.model.get_submodule(member.module), "groups", 1) == 1


def _products(module: torch.nn.Module, x: Tensor, b: Tensor) -> Tensor:
    """Σ_t b_t a_tᵀ over one call with roots b [k, n, *z], [k, n, out, in+1]."""
    a = patches(module, x)  # [n, groups, T, in+1]
    grouped = per_group(by_position(module, b, lead=1), a.shape[1])
    return (grouped.mT @ a).flatten(2, 3)
