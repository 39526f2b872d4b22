"""What becomes of a BFGS factor that is no longer positive definite: it begins anew.

H_g and H_a learn from themselves, so that nothing mends one that rounding has made indefinite or
that holds a NaN: every pair would be refused from then on. What is seen of it, yᵀH_g y or x̄ᵀH_a x̄
negative or not finite, is noted in the step; the next one that updates starts that factor again. On
a GPU nobody waits for the note: it is read once it has reached the host.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from optim import distributed
from optim.errors import NumericalError
from optim.layers import Block
from optim.linalg import free_to_read, known_true
from optim.refresh import PATIENCE, to_host
from optim.stacks import Stack

FACTORS = ("H_g", "H_a")


class Restarts:
    """The notes of one optimizer: state "broken" [size, 2] bool, "restarts" [size, 2] in a row."""

    def __init__(self) -> None:
        self._read: dict[Stack, Tensor] = {}
        self._on_its_way: tuple[list[Stack], Tensor, torch.cuda.Event] | None = None

    def loaded(self, stacks: Iterable[Stack]) -> None:
        """Another state has been loaded: what it says is under way."""
        self._read, self._on_its_way = {}, None
        self.send(stack for stack in stacks if "broken" in stack)

    def note(self, stack: Stack, flags: dict[str, Tensor], seen: Tensor) -> None:
        """Keep which factors are broken, {"H_g", "H_a": [size] bool}; seen [size] have learned."""
        if "broken" not in stack:
            stack.hold(
                broken=stack.zeros(2, dtype=torch.bool), restarts=stack.zeros(2, dtype=torch.int64)
            )
        now = torch.stack([flags[name] for name in FACTORS], -1) & seen[:, None]
        if not (known_true(~now) and known_true(stack["restarts"] == 0)):
            stack["restarts"].mul_(now | ~seen[:, None])
        stack["broken"].copy_(now | (stack["broken"] & ~seen[:, None]))

    def send(self, stacks: Iterable[Stack]) -> None:
        """Let the host know what was noted, without waiting for it."""
        noted = [stack for stack in stacks if not free_to_read(stack["broken"])]
        if noted and self._on_its_way is None:
            host, event = to_host(torch.cat([stack["broken"] for stack in noted]))
            self._on_its_way = noted, host, event

    def due(self, stack: Stack, blocks: Iterable[Block]) -> dict[str, list[Block]]:
        """{factor: the blocks among these whose factor has to begin anew}, as far as is known."""
        if "broken" not in stack:
            return {}
        flags = self._known(stack)
        if flags is None or not bool(flags.any()):
            return {}
        return {
            name: [b for b in blocks if bool(flags[stack.places[b], i].any())]
            for i, name in enumerate(FACTORS)
        }

    def restart(self, stack: Stack, name: str, block: Block, anew: Callable[[], None]) -> None:
        """Have a block's factor made anew by `anew` and count it.

        Raises: NumericalError at the third time in a row.
        """
        place, i = stack.places[block], FACTORS.index(name)
        row = stack["restarts"][place, i]
        row += stack["broken"][place, i]
        if int(row.max()) >= PATIENCE:
            raise NumericalError(
                f"layer '{block.name}': {name} was not positive definite {PATIENCE} times in a "
                "row, though it began anew; raise the damping, lower lr, or look for inputs that "
                "are not finite or very large"
            )
        anew()
        stack["broken"][place, i] = False
        if stack in self._read:
            self._read[stack][place, i] = False

    def _known(self, stack: Stack) -> Tensor | None:
        """The flags as the host knows them, [size, 2]; None where the news is under way."""
        if free_to_read(stack["broken"]):
            return stack["broken"]
        if self._on_its_way is not None:
            stacks, host, event = self._on_its_way
            if distributed.size() > 1:  # or one process might begin anew a step earlier
                event.synchronize()
            if event.query():
                self._read = dict(zip(stacks, host.split([s.size for s in stacks]), strict=True))
                self._on_its_way = None
        return self._read.get(stack)
