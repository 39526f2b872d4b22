"""CURVES: pictures of smooth curves, each given by three random points in the plane."""

import numpy as np
import torch
from torch import Tensor

from .cache import Arrays, cached
from .tensors import Data, reconstruction

TRAIN, TEST, SIDE = 20_000, 10_000, 28
MARGIN, HALF_WIDTH = 3.0, 1.0  # in pixels: of the points from the edge; of the stroke
PIECES, CHUNK = 24, 50
VERSION = 1  # of the recipe; raise it with every change of what it makes


def curves(seed: int = 0) -> Data:
    """CURVES as rows of 784 in [0, 1]: 20,000 to train, 10,000 to test, from one generator.

    Three points, uniform in the picture but for its margin, are the control points of a quadratic
    Bézier curve, drawn as by `draw`. So six numbers give a picture, as many as the code of the
    autoencoder has. Made once, in seconds, and cached.

    Source: the idea is that of Hinton and Salakhutdinov 2006, supplement; their pictures were
    never described further, and these are not theirs: compare no loss with published ones.
    """
    made = cached(f"curves-{VERSION}-seed{seed}", lambda: pictures(TRAIN + TEST, seed))["pictures"]
    pixels = made / np.float32(255)
    return reconstruction(pixels[:TRAIN], pixels[TRAIN:])


def few_curves(train: int = 500, test: int = 100) -> Data:
    """A few pictures like those of `curves`, in a moment and without the cache."""
    pixels = pictures(train + test, seed=0)["pictures"] / np.float32(255)
    return reconstruction(pixels[:train], pixels[train:])


def pictures(count: int, seed: int) -> Arrays:
    """{"pictures": [count, 784]} as bytes."""
    random = torch.Generator().manual_seed(seed)
    points = torch.rand((count, 3, 2), generator=random, dtype=torch.float32)
    points = MARGIN + (SIDE - 2 * MARGIN) * points
    drawn = torch.cat([(255 * draw(each)).round().to(torch.uint8) for each in points.split(CHUNK)])
    return {"pictures": drawn.numpy()}


def draw(points: Tensor) -> Tensor:
    """Pictures [n, 784] in [0, 1] of the curves with control points [n, 3, 2] (x, y in pixels).

    A pixel whose middle is at distance d of the curve is min(1, max(0, w + ½ − d)), w the half
    width of the stroke: a slope of one pixel's length at its edges, against steps. The distance is
    that of a chain of 24 straight pieces, which is at most 0.03 pixels off the curve.
    """
    t = torch.linspace(0, 1, PIECES + 1).to(points)[:, None]
    weights = torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], dim=1)
    ends = weights @ points  # [n, pieces + 1, 2]
    start, step = ends[:, :-1], ends.diff(dim=1)
    length = step.norm(dim=2, keepdim=True)
    tangent = torch.where(length > 1e-3, step / length, torch.tensor([1, 0]).to(points))
    normal = torch.stack([-tangent[..., 1], tangent[..., 0]], dim=2)
    middles = torch.arange(SIDE).to(points) + 0.5
    y, x = (each.flatten() for each in torch.meshgrid(middles, middles, indexing="ij"))
    grid = torch.stack([x, y])  # [2, pixels]
    along = tangent @ grid - (tangent * start).sum(2, keepdim=True)  # [n, pieces, pixels]
    beyond = along - along.clamp_min(0).minimum(length)
    across = normal @ grid - (normal * start).sum(2, keepdim=True)
    distance = (beyond.square_() + across.square_()).amin(dim=1).sqrt()
    return (HALF_WIDTH + 0.5 - distance).clamp(0, 1)
