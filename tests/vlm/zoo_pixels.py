"""Pixels for the zoo where a family's image processor needs torchvision: noise in the shapes that it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

# Earlier versions name their image processors otherwise.
transformers = pytest.importorskip("transformers", minversion="5.23")

from transformers.image_processing_utils import BaseImageProcessor  # noqa: E402
from transformers.processing_utils import ImagesKwargs  # noqa: E402


class _AnyOption(ImagesKwargs, total=False):
    return_row_col_info: bool
    crop_to_patches: bool
    min_patches: int
    max_patches: int


class Noise(BaseImageProcessor):
    """Stands in for an image processor that needs torchvision: noise in the shapes that it gives."""

    valid_kwargs = _AnyOption

    def __init__(self, make: Callable[[list[Tensor]], dict[str, Any]], **attributes: Any) -> None:
        super().__init__()
        self.make = make
        for name, value in attributes.items():
            setattr(self, name, value)

    def __call__(self, images: Any, **_: Any) -> dict[str, Any]:
        flat = [image for row in images for image in (row if isinstance(row, (list, tuple)) else [row])]
        return self.make([torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 128 - 1 for image in flat])

    def fetch_images(self, images: Any) -> Any:
        return images


def patches(image: Tensor, size: int = 4) -> Tensor:
    """The patches of an image, by rows, each flat."""
    return image.unfold(1, size, size).unfold(2, size, size).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)


def grids(name: str = "image_grid_thw", *shape: int, **attributes: Any) -> Noise:
    """Flat patches of all images in one tensor, and how many there are in each direction."""

    def make(images: list[Tensor]) -> dict[str, Any]:
        pixels = torch.cat([patches(image) for image in images])
        grid = torch.tensor([[1, image.shape[1] // 4, image.shape[2] // 4] for image in images])
        grid = grid[:, 1:] if name.endswith("_hw") else grid
        return {"pixel_values": pixels.unflatten(1, shape) if shape else pixels, name: grid}

    return Noise(make, **{"patch_size": 4, "merge_size": 2, "temporal_patch_size": 1, **attributes})


def tiles(**more: Any) -> Callable[[list[Tensor]], dict[str, Any]]:
    """Square tiles of 16 pixels, one after the other, and their number in each image."""

    def make(images: list[Tensor]) -> dict[str, Any]:
        tiles = [image.unfold(2, 16, 16).permute(2, 0, 1, 3) for image in images]
        number = torch.tensor([len(tile) for tile in tiles])
        ratios = torch.tensor([[1, len(tile)] for tile in tiles])
        # An image of several tiles comes once more as a whole.
        whole = [torch.cat([tile, tile[:1]]) if len(tile) > 1 and more.get("whole") else tile for tile in tiles]
        return {
            "pixel_values": torch.cat(whole),
            more.get("name", "num_patches"): ratios if "ratios" in more else number,
        }

    return make


def lfm2(images: list[Tensor]) -> dict[str, Any]:
    """A wide image comes in two tiles and once more as a whole."""
    parts = [
        [image[..., :16], image[..., 16:], image[..., :16]] if image.shape[2] > 16 else [image] for image in images
    ]
    pixels = torch.stack([patches(part) for whole in parts for part in whole])
    keys = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(pixels.shape[:2], dtype=torch.int64)}
    rows_and_columns = {"image_rows": [1] * len(images), "image_cols": [max(1, len(whole) - 1) for whole in parts]}
    shapes = torch.tensor([[4, 4]] * len(pixels))
    return {**keys, "spatial_shapes": shapes, **rows_and_columns, "image_sizes": [[16, 16]] * len(images)}


def minicpm(images: list[Tensor]) -> dict[str, Any]:
    """An image of two tiles comes as a whole and in two slices, one below the other."""
    parts = [[image[..., :16]] * (3 if image.shape[2] > 16 else 1) for image in images]
    strips = [part.unfold(1, 4, 4).permute(0, 3, 1, 2).flatten(2) for whole in parts for part in whole]
    sizes = torch.tensor([[4, 4]] * len(strips), dtype=torch.int32)
    grids = torch.tensor([[2, 1] if len(whole) > 1 else [0, 0] for whole in parts])
    counts = {"grids": grids, "num_patches_per_image": [len(whole) for whole in parts]}
    return {"pixel_values": torch.cat(strips, dim=-1)[None], "target_sizes": sizes, **counts}


def molmo2(images: list[Tensor]) -> dict[str, Any]:
    """One crop an image, low and high resolution alike, pooled two by two."""
    crops = torch.stack([patches(image) for image in images]).repeat_interleave(2, dim=0)
    corner = torch.tensor([[row + column for row in (0, 4) for column in (0, 1)]])
    pool = torch.cat([corner + 8 * row + 2 * column for row in range(2) for column in range(2)])
    pooling = torch.cat([pool + 16 * crop for crop in range(len(crops))])
    grids = torch.tensor([[2, 2, 2, 2]] * len(images))
    number = torch.tensor([2] * len(images))
    return {"pixel_values": crops, "image_token_pooling": pooling, "image_grids": grids, "image_num_crops": number}


def inkling(images: list[Tensor]) -> dict[str, Any]:
    patches = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).flatten(0, 1) for image in images]
    pixels = torch.cat(patches)[:, None].repeat(1, 2, 1, 1, 1)
    return {"pixel_values": pixels, "num_patches": torch.tensor([len(patch) for patch in patches])}


def inkling2(images: list[Tensor]) -> dict[str, Any]:
    patches = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 3, 4, 0).flatten(0, 1) for image in images]
    grid = torch.tensor([[1, image.shape[1] // 8, image.shape[2] // 8] for image in images])
    return {"pixel_values": torch.cat(patches), "image_grid_thw": grid}


def gemma4_unified(images: list[Tensor]) -> dict[str, Any]:
    flat = torch.stack([patches(image, 12) for image in images])
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), dim=-1).flatten(0, 1)
    number = torch.tensor([flat.shape[1]] * len(images))
    places = place.repeat(len(images), 1, 1)
    return {"pixel_values": flat, "image_position_ids": places, "num_soft_tokens_per_image": number}


def views(size: int, **more: Any) -> Callable[[list[Tensor]], dict[str, Any]]:
    """Each image as a whole; with ``tiles`` a wide one in two tiles, too, with ``grid`` the number of tiles."""

    def make(images: list[Tensor]) -> dict[str, Any]:
        whole = torch.stack([nn.functional.interpolate(image[None], size)[0] for image in images])
        grid = {"patches_grid": [[1, 1]] * len(images)} if "grid" in more else {}
        if "tiles" not in more:
            return {"pixel_values": whole, "num_local_patches": [0] * len(images), **grid}
        tiles = [[image[..., :16], image[..., 16:]] if image.shape[2] > 16 else [] for image in images]
        local = {"pixel_values_local": torch.stack([tile for row in tiles for tile in row])} if any(tiles) else {}
        breaks = {"patch_newline_masks": [[True] * len(row) for row in tiles]}
        return {"pixel_values": whole, **local, "num_local_patches": [len(row) for row in tiles], **breaks}

    return make
