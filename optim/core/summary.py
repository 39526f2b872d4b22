"""The table of `summary()`: treatment, memory of the state and counters of each parameter."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocks.blocks import Block, plain_reasons
from ..blocks.partitions import Part


def table(
    optimizer: Optimizer,
    model: nn.Module,
    blocks: Iterable[Block | Part],
    counts: Sequence[str],
) -> str:
    """Plain text, one line per parameter, then the totals.

    counts: names of the entries of each weight's state["counts"].
    """
    blocks = list(blocks)
    treatment = {p: f"plain rule: {why}" for p, why in plain_reasons(model, blocks).items()}
    for block in blocks:
        treatment |= block.treatments
    rows = [("parameter", "shape", "treatment", "memory", "counters")]
    total = 0
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        size = memory(state)
        total += size
        trained, shape = treatment.get(parameter, "frozen"), str(list(parameter.shape))
        rows.append((name, shape, trained, readable(size), _counters(state, counts)))
    step = optimizer.param_groups[0]["step"]
    head = f"{type(optimizer).__name__} after {step} steps, {len(blocks)} blocks"
    return "\n".join([head, *aligned(rows), f"total memory of the state: {readable(total)}"])


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines of a table, its columns padded to one width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def memory(state: dict[str, Tensor]) -> int:
    """Bytes of the tensors in one parameter's state."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))


def readable(size: int) -> str:
    """Bytes in decimal units.

    >>> readable(512), readable(8_000_000)
    ('512 B', '8.0 MB')
    """
    value = float(size)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def _counters(state: dict[str, Tensor], names: Sequence[str]) -> str:
    """Counters that are not zero, as text."""
    # the groups of a grouped convolution count for themselves
    numbers = state["counts"].reshape(-1, len(names)).sum(0).tolist() if "counts" in state else []
    parts = [f"{name} {n}" for name, n in zip(names, numbers, strict=bool(numbers)) if n]
    if "nonfinite" in state and int(state["nonfinite"]):
        parts.append(f"not finite {int(state['nonfinite'])}")
    return ", ".join(parts)
