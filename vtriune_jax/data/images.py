"""Encoded image bytes → RGB → patches, late, by transformers' PIL image processor."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageOps

from vtriune_jax.errors import UserError

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

_BROKEN = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error)


def decode(data: bytes, where: str) -> Image.Image:
    """Decode to upright RGB; transparent parts become white. `where` names the sample in errors."""
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)
        return _to_rgb(image)
    except (*_BROKEN, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where}: the image cannot be decoded ({type(error).__name__}: {error}); "
            "replace the picture or drop the row"
        ) from error


def patches(
    images: Sequence[bytes],
    processor: Qwen2VLImageProcessorPil,
    where: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[Float[np.ndarray, "patches patch"], Int[np.ndarray, "images 3"]]:
    """Decode, resize and cut images; returns their patches and (frames, rows, columns) of each.

    Sides become multiples of 28 pixels and the area lies between `min_pixels` and `max_pixels`
    (default: the checkpoint's), the aspect ratio kept as well as possible.
    """
    if not images:
        size = 3 * processor.temporal_patch_size * processor.patch_size**2
        return np.zeros((0, size), np.float32), np.zeros((0, 3), np.int32)
    limits = {
        "shortest_edge": min_pixels or processor.size["shortest_edge"],
        "longest_edge": max_pixels or processor.size["longest_edge"],
    }
    decoded = [decode(data, where) for data in images]
    for image in decoded:
        if max(image.size) > 200 * min(image.size):
            raise UserError(
                f"{where}: an image of {image.width}×{image.height} pixels is too narrow; "
                "crop it to an aspect ratio below 200"
            )
    out = processor(decoded, size=limits, input_data_format="channels_last", return_tensors="np")
    return np.asarray(out["pixel_values"], np.float32), np.asarray(out["image_grid_thw"], np.int32)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey values at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
