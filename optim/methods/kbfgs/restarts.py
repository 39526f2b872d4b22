"""Restart of BFGS factors that are no longer positive definite: every pair would be refused."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ...blocks.blocks import Block
from ...capture.capture import Totals
from ...core import distributed
from ...core.errors import NumericalError
from ...core.harness import Harness
from ...core.refresher import PATIENCE, to_host
from ...core.stacks import Stack
from ...linalg.basics import finite, free_to_read
from .formulas import start_h_a, start_h_g
from .statistics import input_factors

FACTORS = ("H_g", "H_a")


class Restarts:
    """Broken factors: state "broken" [size, 2] bool, "restarts" [size, 2] in a row.

    Broken: yᵀH_g y or x̄ᵀH_a x̄ is negative or not finite. The next step that updates starts that
    factor again; on a GPU, once the note has reached the host.
    """

    def __init__(self, harness: Harness) -> None:
        self._harness = harness
        self._read: dict[Stack, Tensor] = {}
        self._on_its_way: tuple[list[Stack], Tensor, torch.cuda.Event] | None = None

    def moved(self) -> None:
        """Follow stacks made anew or a loaded state: send their flags to the host."""
        self._read, self._on_its_way = {}, None
        self.send(stack for stack in self._harness.stacks if "broken" in stack)

    def note(self, stack: Stack, flags: dict[str, Tensor], seen: dict[str, Tensor]) -> None:
        """Keep which factors are broken, {"H_g", "H_a": [size] bool}, of those seen in the step.

        Seen is a factor that something finite was multiplied with.
        """
        if "broken" not in stack:
            stack.hold(
                broken=stack.zeros(2, dtype=torch.bool), restarts=stack.zeros(2, dtype=torch.int64)
            )
        unseen = torch.stack([~seen[name] for name in FACTORS], -1)
        now = torch.stack([flags[name] for name in FACTORS], -1) & ~unseen
        stack["restarts"].mul_(now | unseen)
        stack["broken"].logical_and_(unseen).logical_or_(now)

    def send(self, stacks: Iterable[Stack]) -> None:
        """Copy the flags to the host without waiting."""
        noted = [stack for stack in stacks if not free_to_read(stack["broken"])]
        if noted and self._on_its_way is None:
            host, event = to_host(torch.cat([stack["broken"] for stack in noted]))
            self._on_its_way = noted, host, event

    def begin_anew(self, stack: Stack, totals: dict[Block, Totals], lambda_a: float) -> None:
        """Restart the factors of these blocks that are known to be broken, and count them.

        totals: of the coming update, λ_A its damping; a convolution's H_a waits for finite inputs.
        Raises: NumericalError at the third time in a row.
        """
        due = self._due(stack, totals)
        for block in due.get("H_g", ()):
            self._begin(stack, "H_g", block)
            start_h_g(stack, [block], self._harness.setting("history"))
        if blocks := due.get("H_a", ()):
            A = input_factors(stack, totals) if stack.convolutional else stack["A"]
            for block in blocks:
                if bool(finite(A[stack.places[block]]).all()):
                    self._begin(stack, "H_a", block)
                    start_h_a(stack, [block], A, lambda_a)

    def _due(self, stack: Stack, blocks: Iterable[Block]) -> dict[str, list[Block]]:
        """{factor: the blocks among these whose factor has to begin anew}, as far as is known."""
        flags = self._known(stack) if "broken" in stack else None
        if flags is None or not bool(flags.any()):
            return {}
        return {
            name: [b for b in blocks if bool(flags[stack.places[b], i].any())]
            for i, name in enumerate(FACTORS)
        }

    def _begin(self, stack: Stack, name: str, block: Block) -> None:
        """Count a restart. Raises: NumericalError at the third time in a row."""
        place, i = stack.places[block], FACTORS.index(name)
        row = stack["restarts"][place, i]
        row += stack["broken"][place, i]
        if int(row.max()) >= PATIENCE:
            raise NumericalError(
                f"layer '{block.name}': {name} was not positive definite {PATIENCE} times in a "
                "row, though it began anew; raise the damping, lower lr, or look for inputs that "
                "are not finite or very large"
            )
        self._harness.count(stack, {f"{name} restarted": stack.mask([block])})
        stack["broken"][place, i] = False
        if stack in self._read:
            self._read[stack][place, i] = False

    def _known(self, stack: Stack) -> Tensor | None:
        """The flags as known on the host, [size, 2]; None while the copy is under way."""
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
