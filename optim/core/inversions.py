"""Inversions and roots of factors as jobs, and the schedule by which they are due."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..blocks.blocks import Block
from .distributed import Solver
from .stacks import Stack

SOLVED_WITH = "solved_with"  # of a parameter group, and so of state_dict: the last damping used


@dataclass(eq=False)
class Job:
    """stack[result] <- solver(stack[factor], damping), for each matrix of a stack.

    solver(M [b, n, n], damping [b]) -> results and for which they are good, [b] bool. For results
    that are several tensors, one may give them side by side in one. A factor [size, ..., n, n] is
    many small matrices for each one of the stack, which are kept or refused together.

    damping: may be a function that makes it, called for jobs that are due.
    matrix: the factor itself, if the stack does not hold one under that name.
    beside: by name, what goes with a result: stack[name] takes it where the result is kept.
    only: matrices of the stack to solve for, [size] bool; None is all of the blocks'.
    setting: of the optimizer, from which the damping was made; itself unless given.
    replacing: called with the results held, the new ones and their place in the stack.
    block: the only one to solve for, so that a stack's work can be shared out over steps.
    """

    stack: Stack
    factor: str
    result: str
    solver: Solver
    damping: float | Tensor | Callable[[], Tensor]
    blocks: list[Block] = field(default_factory=list)
    matrix: Tensor | None = None
    beside: dict[str, Tensor] = field(default_factory=dict)
    only: Tensor | None = None
    setting: float | Tensor | None = None
    replacing: Callable[[Tensor, Tensor, slice], None] | None = None
    block: Block | None = None

    def shared_out(self) -> list["Job"]:
        """The same work block by block."""
        if len(self.stack.blocks) == 1:
            return [self]
        return [replace(self, block=block) for block in self.stack.blocks]

    @property
    def place(self) -> slice:
        """Where in the stack its matrices are."""
        return slice(None) if self.block is None else self.stack.places[self.block]

    @property
    def M(self) -> Tensor:
        """The factor, [matrices, ..., n, n]."""
        return (self.stack[self.factor] if self.matrix is None else self.matrix)[self.place]

    @property
    def live(self) -> Tensor:
        """Which of its matrices are to be solved for, [matrices] bool."""
        mask = self.stack.mask(self.blocks)
        return (mask if self.only is None else mask & self.only)[self.place]

    @property
    def started(self) -> list[Block]:
        """Its blocks that have a state."""
        return [block for block in self.stack.started if self.block in (None, block)]

    @property
    def new(self) -> list[Block]:
        """Started blocks that have no result yet."""
        have = self.stack.solved.get(self.result, set())
        return [block for block in self.started if block not in have]

    @property
    def damped_by(self) -> float | Tensor:
        """The setting behind the damping."""
        if self.setting is not None:
            return self.setting
        assert not callable(self.damping), "a function needs the setting behind it"
        return self.damping

    @property
    def damping_changed(self) -> bool:
        """Whether the setting may not be that of the last results; tensors are not looked at."""
        now = self.damped_by
        return isinstance(now, Tensor) or self.stack.group.get(SOLVED_WITH) != now

    @property
    def failures(self) -> Tensor:
        """How often in a row each matrix failed, [matrices]; part of the layers' state."""
        name = f"{self.factor}_failures"
        if name not in self.stack:
            self.stack.hold(**{name: self.stack.zeros(dtype=torch.int64)})
        return self.stack[name][self.place]

    @property
    def n(self) -> int:
        """Size of each matrix."""
        return self.M.shape[-1]

    @property
    def key(self) -> tuple:
        """Jobs with the same key are solved together."""
        M = self.M
        return self.solver, self.n, M.dtype, M.device

    @property
    def cost(self) -> float:
        """Arithmetic of a solution, up to a factor."""
        return float(self.M.numel() * self.n)

    def matrices(self) -> Tensor:
        """The factor as [b, n, n]."""
        return self.M.flatten(0, -3)

    def dampings(self) -> Tensor:
        """One damping for each of the matrices, [b]."""
        M = self.matrices()
        damping = self.damping() if callable(self.damping) else self.damping
        if isinstance(damping, Tensor):
            own = damping.to(M.dtype).expand(self.stack.size)[self.place]
            return own.repeat_interleave(len(M) // len(own))
        return M.new_full((len(M),), damping)

    def shaped(self, result: Tensor, ok: Tensor) -> tuple[Tensor, Tensor]:
        """A solver's results as the stack holds them, and which are good, [matrices] bool."""
        many = self.M.shape[:-2]
        return result.unflatten(0, many), ok.reshape(many[0], -1).all(1)

    def place_for(self, name: str, new: Tensor) -> Tensor:
        """Memory in the stack of this name for what is like `new`, zero at first."""
        if name not in self.stack:
            # row by row, as a loaded one is: products of the other layout round differently
            self.stack.hold(**{name: self.stack.zeros(*new.shape[1:], dtype=new.dtype)})
        return self.stack[name][self.place]

    def name_of(self, wanted: Tensor) -> str:
        """The first layer one of whose matrices is wanted, [matrices] bool."""
        first = self.place.start or 0
        blocks = self.stack.blocks if self.block is None else [self.block]
        places = {block.name: self.stack.places[block] for block in blocks}
        return next(
            name
            for name, place in places.items()
            if bool(wanted[place.start - first : place.stop - first].any())
        )


def offsets(costs: Sequence[float], every: int) -> list[int]:
    """Steps of a period at which jobs come: the dearest first, each to the step with least to do.

    >>> offsets([8, 1, 8, 1], 2)
    [0, 0, 1, 1]
    """
    loads, chosen = [0.0] * every, [0] * len(costs)
    for j in sorted(range(len(costs)), key=lambda j: -costs[j]):
        chosen[j] = loads.index(min(loads))
        loads[chosen[j]] += costs[j]
    return chosen
