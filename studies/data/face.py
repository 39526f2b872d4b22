"""Olivetti's faces, and FACES, patches cut out of them by our own recipe."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from . import published, source
from .cache import Arrays, cached
from .reader import read_matlab
from .tensors import Data, standardised

PICTURES, SIDE = 400, 64  # ten of each of 40 people, one person after the other
OF_A_PICTURE, PATCH = 414, 25
TRAIN_PEOPLE, TEST_PEOPLE = range(25), range(30, 40)  # five are kept apart, as published
ANGLE, SCALES = 90.0, (1.4, 1.8)  # degrees to either side; pixels of the picture per patch pixel
VERSION = 1  # of the recipe of FACES; raise it with every change of what it makes


def olivetti() -> Data:
    """Olivetti's faces as pictures [n, 1, 64, 64] in [0, 1], with the person [n] of 40 as label.

    The first eight pictures of each person to train, the last two to test: 320 and 80. Read from
    $KRONSCOPE_DATA/olivetti/olivettifaces.mat where that folder is, else from the cache, else
    fetched.

    Raises: ValueError or FileNotFoundError naming the file, what was expected and the remedy.
    """
    pictures = _pictures()
    x = torch.from_numpy(pictures / np.float32(pictures.max()))[:, None]
    person, place = torch.arange(PICTURES) // 10, torch.arange(PICTURES) % 10
    train, test = place < 8, place >= 8
    return Data(x[train], person[train], x[test], person[test])


def faces(seed: int = 0) -> Data:
    """FACES: 25x25 patches of Olivetti's faces as rows of 625; 103,500 to train, 41,400 to test.

    414 patches of each picture, each turned by up to 90 degrees either way, shrunk by 1.4 to 1.8
    and placed anywhere inside the picture, all uniform; shuffled, those to train and those to test
    apart. The first 25 people are for training, the last ten for testing. Less the mean of the
    patches to train, pixel by pixel, and divided by one number, so that their variance averages 1.
    Made once, in seconds, and cached; the pictures are found as those of `olivetti`; errors as
    there.

    Source: Hinton and Salakhutdinov 2006, supplement; the published patches themselves (from the
    same pictures, in the same numbers, of the same people) were drawn with another generator.
    """
    pictures = _pictures()
    origin = hashlib.sha256(pictures.tobytes()).hexdigest()[:8]
    made = cached(f"faces-{VERSION}-seed{seed}-of-{origin}", lambda: patches(pictures, seed))
    return standardised(made["train"], made["test"])


def patches(pictures: np.ndarray, seed: int) -> Arrays:
    """Patches of `faces` as bytes, {"train": [103500, 625], "test": [41400, 625]}."""
    random = torch.Generator().manual_seed(seed)
    made = {}
    for name, people in {"train": TRAIN_PEOPLE, "test": TEST_PEOPLE}.items():
        own = torch.from_numpy(pictures[people.start * 10 : people.stop * 10])
        found = torch.cat([cut(each, OF_A_PICTURE, random) for each in own.split(10)])
        order = torch.randperm(len(found), generator=random)
        made[name] = found[order].round().to(torch.uint8).numpy()
    return made


def cut(pictures: Tensor, count: int, random: torch.Generator) -> Tensor:
    """Cut `count` random patches out of each of the pictures [n, 64, 64]: [n count, 625], float32.

    None reaches beyond its picture: at the largest scale and 45 degrees it just fits.
    """
    n = len(pictures)

    def uniform(low: float, high: float) -> Tensor:
        u = torch.rand((n, count), generator=random, dtype=torch.float32)
        return low + (high - low) * u

    angle, scale = uniform(-math.radians(ANGLE), math.radians(ANGLE)), uniform(*SCALES)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    room = (SIDE - 1) / 2 - (PATCH - 1) / 2 * (cos.abs() + sin.abs())
    x0, y0 = room * uniform(-1, 1), room * uniform(-1, 1)  # of the middle, from the picture's
    along = torch.arange(PATCH, dtype=torch.float32) - (PATCH - 1) / 2
    y, x = (each.flatten() for each in torch.meshgrid(along, along, indexing="ij"))
    at = torch.stack(
        [
            x0[..., None] + cos[..., None] * x - sin[..., None] * y,
            y0[..., None] + sin[..., None] * x + cos[..., None] * y,
        ],
        dim=-1,
    )
    whole = pictures[:, None].to(torch.float32)
    return grid_sample(whole, at / ((SIDE - 1) / 2), align_corners=True).reshape(n * count, -1)


def _pictures() -> np.ndarray:
    """Bytes [400, 64, 64], upright."""
    title = "Olivetti's faces"
    path = source.folder(title) / "olivettifaces.mat"
    columns = read_matlab(path, {"faces": (SIDE * SIDE, PICTURES)})["faces"]
    if not published.same(path.read_bytes(), published.FETCHED_FACES, path.name):
        published.check(path, columns, title, path.name)
    return np.ascontiguousarray(columns.T.reshape(PICTURES, SIDE, SIDE).transpose(0, 2, 1))
