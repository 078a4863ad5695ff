"""Pictures of rotated regular polygons, drawn here: grey levels, no outline, no two alike."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Generator, Tensor

SIDES = (3, 4, 5, 6)
CELL = 16
_SAMPLES = 3  # per pixel and axis: edges are smooth


@lru_cache
def polygons(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Polygons of random kind, rotation, size and place.

    Args:
        count: how many.
        seed: of their own random numbers.

    Returns:
        Pictures ``(count, 16, 16)`` in [-1, 1], and the index in ``SIDES`` of what each shows, ``(count,)``.
    """
    generator = Generator().manual_seed(seed)
    kinds = torch.randint(len(SIDES), (count,), generator=generator)
    uniform = torch.rand(count, 4, 1, 1, generator=generator)
    radius, turn = 5.5 + 2.0 * uniform[:, 0], 2 * math.pi * uniform[:, 1]
    grid = (torch.arange(CELL * _SAMPLES) + 0.5) / _SAMPLES - CELL / 2
    x = grid[None, None, :] - (uniform[:, 2] - 0.5)
    y = grid[None, :, None] - (uniform[:, 3] - 0.5)
    wedge = (2 * math.pi / torch.tensor(SIDES)[kinds])[:, None, None]
    # The distance to the side that faces a point, against that of the side from the centre.
    angle = (torch.atan2(y, x) - turn).remainder(wedge) - wedge / 2
    inside = torch.hypot(x, y) * angle.cos() <= radius * (wedge / 2).cos()
    filled = inside.float().unflatten(2, (CELL, _SAMPLES)).unflatten(1, (CELL, _SAMPLES)).mean(dim=(2, 4))
    return 2 * filled - 1, kinds
