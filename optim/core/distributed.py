"""Data-parallel training: statistics and inverses joined over torch.distributed processes.

Every process holds the state of one process on the joint batch; inverses are shared out.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.functional import pad

from ..blocks.blocks import Block
from ..capture.capture import Totals

Solver = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
MEANS = ("A", "G", "x", "z", "gradient")  # over rows
SUMS = {"g": 1, "GG": 2}  # over rows of what backward delivered, of this degree in it


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def alone(who: str, instead: str) -> None:
    """Raise ValueError if there are several processes, for methods that would let them diverge."""
    if size() > 1:
        raise ValueError(
            f"{who} does not support several processes ({size()} in torch.distributed): it would "
            f"decide in each by its own part of the batch; {instead}"
        )


def wrapped(model: nn.Module, who: str) -> None:
    """Raise ValueError if there are several processes and the model is not wrapped for them."""
    if size() > 1 and not hasattr(model, "no_sync"):
        raise ValueError(
            f"{who} runs the model twice a step; with several processes give it the "
            f"DistributedDataParallel model itself, not the {type(model).__name__} inside"
        )


def add_up_(*tensors: Tensor) -> None:
    """Each tensor <- its sum over the processes."""
    if size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.all_reduce(whole)
            if whole is not tensor:
                tensor.copy_(whole)


def summed(count: int, device: torch.device) -> int:
    """A whole number's sum over the processes."""
    if size() == 1:
        return count
    total = torch.tensor(count, device=device)
    add_up_(total)
    return int(total)


def gathered(rows: Tensor) -> Tensor:
    """Rows [s, m, T, n] of all processes, [s, Σ m, T, n], shorter ones ending in zeros."""
    if size() == 1:
        return rows
    own = torch.tensor(rows.shape[1:3], device=rows.device)
    dist.all_reduce(own, dist.ReduceOp.MAX)
    m, T = own.tolist()
    rows = pad(rows, (0, 0, 0, T - rows.shape[2], 0, m - rows.shape[1])).contiguous()
    parts = [torch.empty_like(rows) for _ in range(size())]
    dist.all_gather(parts, rows)
    return torch.cat(parts, 1)


def shares(many: int, cost: float, loads: list[float]) -> list[int]:
    """How many of so many equal tasks each process gets; adds what they cost to its load.

    The rest of a division goes to those with least to do:
        >>> shares(3, 1.0, [2.0, 0.0])
        [1, 2]
    """
    whole, rest = divmod(many, len(loads))
    more = sorted(range(len(loads)), key=lambda process: loads[process])[:rest]
    counts = [whole + (process in more) for process in range(len(loads))]
    for process, count in enumerate(counts):
        loads[process] += count * cost
    return counts


def solved(solver: Solver, M: Tensor, damping: Tensor, loads: list[float]) -> tuple[Tensor, Tensor]:
    """The solver's results for M [b, n, n], damping [b], each process having made some of them.

    loads: what each has done already, in units of n³; this is added.
    """
    if size() == 1:
        return solver(M, damping)
    counts = shares(len(M), float(M.shape[-1]) ** 3, loads)
    first = sum(counts[: rank()])
    own = slice(first, first + counts[rank()])
    part, good = solver(M[own], damping[own])
    results, ok = part.new_zeros(len(M), *part.shape[1:]), good.new_zeros(len(M), dtype=torch.int32)
    results[own], ok[own] = part, good.to(ok.dtype)
    add_up_(results, ok)
    return results, ok.bool()


def join_(blocks: Iterable[Block], totals: dict[Block, Totals]) -> None:
    """Make totals of this process those of the joint batch; what they keep stays its own part.

    blocks: all of the optimizer's, in the same order everywhere. With m of M examples here,
    backward under a mean loss has delivered g / m where it would have g / M. Waits for the device:
    the numbers of examples are needed in Python.

    Raises: ValueError naming a layer that not all processes have used, or a statistic unheard of.
    """
    if size() == 1:
        return
    for block, rows, examples in _joint_counts(blocks, totals):
        total = totals[block]
        by_rows, by_examples = total.rows / rows, total.examples / examples
        for name, part in total.means.items():
            weight = by_rows if name in MEANS else by_examples ** _degree(name)
            total.means[name] = part.mul_(weight)
        add_up_(*total.means.values())
        total.rows, total.examples, total.share = rows, examples, by_examples


def _degree(name: str) -> int:
    if name not in SUMS:
        raise ValueError(
            f"no rule for joining the statistic {name!r} over processes; known: {[*MEANS, *SUMS]}"
        )
    return SUMS[name]


def _joint_counts(
    blocks: Iterable[Block], totals: dict[Block, Totals]
) -> list[tuple[Block, int, int]]:
    """Rows and examples of each of the blocks in the totals, over all processes."""
    blocks = list(blocks)
    own = [(1, totals[b].rows, totals[b].examples) if b in totals else (0, 0, 0) for b in blocks]
    counts = torch.tensor(own, device=blocks[0].weight.device)
    add_up_(counts)
    joint = list(zip(blocks, counts.tolist(), strict=True))
    if names := [block.name for block, (users, _, _) in joint if 0 < users < size()]:
        raise ValueError(
            f"layers {names} were used in some of the {size()} processes only; run every layer in "
            "every process, or give none of them a gradient"
        )
    return [(block, rows, examples) for block, (users, rows, examples) in joint if users]
