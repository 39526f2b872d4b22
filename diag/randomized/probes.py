"""Seeded random probes, products with blocks of them, and intervals over them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from ..estimate import Estimate
from ..operators import Operator, like

LEVEL = 0.95  # of every interval
CHUNK_BYTES = 2**27  # of a block of vectors multiplied at once


@dataclass(frozen=True)
class ProbeEstimate(Estimate):
    """Estimate from n random probes of a fixed matrix, with the standard error of `value`.

    [low, high] is the 95 % Student-t interval over the probes, not over batches.
    """

    standard_error: float = math.nan


def rademacher(d: int, probes: int, generator: torch.Generator) -> Tensor:
    """Independent signs ±1, [d, probes] in float64, on the generator's device."""
    device = generator.device
    # probe by probe: the same probes however they are cut into blocks
    bits = [torch.randint(2, (d,), generator=generator, device=device) for _ in range(probes)]
    return torch.stack(bits, dim=1).double() * 2 - 1


def gaussian(d: int, probes: int, generator: torch.Generator) -> Tensor:
    """Independent standard normal entries, [d, probes] in float64, on the generator's device."""
    columns = torch.empty(probes, d, dtype=torch.float64, device=generator.device)
    for column in columns:
        column.normal_(generator=generator)
    return columns.T


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """The generator, or for None a new one seeded 0."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def check_probes(probes: int) -> None:
    """Raise ValueError for fewer probes than an interval needs."""
    if probes < 2:
        raise ValueError(f"probes must be at least 2 to tell an error from them, not {probes}")


def probe_blocks(
    operator: Operator, probes: int, generator: torch.Generator | None, rows: int = 1
) -> Iterator[Tensor]:
    """Rademacher probes in blocks [d, c], in float64 on the operator's device.

    rows: vectors [d] kept per probe, for which a block fits CHUNK_BYTES.
    Raises: ValueError for probes < 2.
    """
    check_probes(probes)
    generator, device, d = seeded(generator), like(operator).device, operator.shape[0]
    for count in _chunks(d * rows, probes):
        yield rademacher(d, count, generator).to(device)


def products(operator: Operator, v: Tensor) -> Tensor:
    """C v, [d, k] in float64, multiplied in the operator's dtype and in chunks.

    Raises: ValueError when it is not finite.
    """
    entries = like(operator)
    with torch.no_grad():
        parts = v.split(_chunks(len(v), v.shape[1]), dim=1)
        found = torch.cat([(operator @ part.to(entries)).double() for part in parts], dim=1)
    if not found.isfinite().all():
        raise ValueError(
            f"a product with this {type(operator).__name__} is not finite: it holds NaN or "
            f"infinity, or overflows {entries.dtype}"
        )
    return found


def _chunks(floats: int, columns: int) -> list[int]:
    """Sizes of the blocks that hold `columns` columns of so many floats each."""
    size = max(1, CHUNK_BYTES // (8 * max(floats, 1)))
    whole, rest = divmod(columns, size)
    return [size] * whole + ([rest] if rest else [])


def over_probes(samples: Tensor) -> ProbeEstimate:
    """Mean of independent samples [n] with its Student-t interval."""
    n = len(samples)
    return with_error(samples.mean().item(), samples.std().item() / n**0.5, n)


def with_error(value: float, standard_error: float, n: int) -> ProbeEstimate:
    """The estimate value ± t·standard_error, t Student's quantile of n - 1 degrees of freedom."""
    reach = t_quantile(n) * standard_error
    return ProbeEstimate(value, value - reach, value + reach, n, standard_error)


def t_quantile(n: int) -> float:
    """Half-width of a LEVEL interval from n samples, in standard errors."""
    return float(stdtrit(n - 1, (1 + LEVEL) / 2))


def rooted(square: ProbeEstimate) -> ProbeEstimate:
    """Square root of an estimate of a quantity >= 0: ends rooted, error by the delta method.

    The interval is cut at 0, where the standard error is infinite.
    """
    value = max(square.value, 0.0) ** 0.5
    low, high = (max(end, 0.0) ** 0.5 for end in (square.low, square.high))
    if square.standard_error == 0:
        return ProbeEstimate(value, low, high, square.n, 0.0)
    error = square.standard_error / (2 * value) if value else math.inf
    return ProbeEstimate(value, low, high, square.n, error)
