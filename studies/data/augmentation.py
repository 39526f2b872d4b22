"""Random data augmentation of whole batches of pictures."""

from collections.abc import Sequence

import torch
from torch import Tensor


def crop_and_flip(
    pictures: Tensor, random: torch.Generator, padding: int = 4, fill: Sequence[float] = (0.0,)
) -> Tensor:
    """Randomly shift pictures [n, c, h, w] by up to `padding` pixels each way and mirror half.

    What comes in at the edges is `fill`, of each channel or of all. Drawn are three numbers a
    picture, on the generator's device: a generator of the CPU gives the same ones for any device.
    """
    n, c, h, w = pictures.shape
    device = pictures.device
    draws = torch.randint(2 * padding + 1, (2, n, 1), generator=random, device=random.device)
    flips = torch.randint(2, (1, n, 1), generator=random, device=random.device)
    down, right, flip = torch.cat([draws - padding, flips]).to(device)
    rows, columns = torch.arange(h, device=device) + down, torch.arange(w, device=device) + right
    columns = torch.where(flip.bool(), columns.flip(1), columns)  # flip [n, 1]
    source = rows.clamp(0, h - 1)[:, :, None] * w + columns.clamp(0, w - 1)[:, None]
    inside = (rows == rows.clamp(0, h - 1))[:, :, None] & (columns == columns.clamp(0, w - 1))[
        :, None
    ]
    flat = source.view(n, 1, h * w).expand(n, c, h * w)
    moved = pictures.reshape(n, c, h * w).gather(2, flat).view(n, c, h, w)
    edge = torch.tensor(fill, dtype=pictures.dtype, device=device)[:, None, None]
    return torch.where(inside[:, None], moved, edge)
