"""Encoded image bytes → RGB → patches, late, as the checkpoint's preprocessor settings say.

The patches are those of transformers' PIL image processor before it turns them to floats: a quarter
of the memory, and of what travels to the device, where the vision tower normalises them. What takes
time here (decoding, resizing, NumPy on arrays) releases the interpreter lock, so that threads share
the work: see `data.feed`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int, UInt8
from PIL import ExifTags, Image, TiffImagePlugin

from vtriune_jax.data import resize
from vtriune_jax.data.schema import BROKEN
from vtriune_jax.errors import UserError
from vtriune_jax.models.config import PIXEL_MEAN, PIXEL_STD, VisionConfig

if TYPE_CHECKING:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

LARGEST = 89_478_485
"""Pixels of the largest picture that is decoded, 340 MiB then; from here on Pillow warns of bombs
that are small as a file and fill the memory."""

THINNEST = 200
"""The aspect ratio above which Qwen2-VL takes no picture."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of this EXIF orientation upright."""

_MAY_TURN = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a PNG that can hold an orientation: as EXIF, in XMP, or in ImageMagick's "Raw profile".
They may follow the pixels, so that only decoding it all would tell."""

WHITE_IS_ZERO = 0
"""Of a TIFF's photometric interpretations."""

_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)

# Pillow returns the memory of each picture to the system, whose new pages then cost a quarter of
# the time of a resize; 16 blocks of 16 MiB at most are kept instead.
Image.core.set_blocks_max(16)


def patches(
    images: Sequence[bytes],
    processor: Qwen2VLImageProcessorPil,
    where: str,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> tuple[UInt8[np.ndarray, "patches patch"], Int[np.ndarray, "images 3"]]:
    """Decode, resize and cut images; returns their patches and (frames, rows, columns) of each.

    `processor` is read for its settings only. Sides become multiples of a token (28 pixels) and the
    area lies between `min_pixels` and `max_pixels` (default: the checkpoint's), the aspect ratio
    kept as well as possible. `where` names the sample in errors.

    Raises:
      UserError: a picture is broken, too large or too thin, or the limits leave no size.
    """
    limits = pixel_limits(processor, min_pixels, max_pixels)
    cut = [_patches(decode(data, where), processor, limits, where) for data in images]
    grid = np.array([grid for _, grid in cut], np.int32).reshape(-1, 3)
    if len(cut) == 1:
        return cut[0][0], grid
    width = 3 * processor.temporal_patch_size * processor.patch_size**2
    return np.concatenate([np.empty((0, width), np.uint8), *(part for part, _ in cut)]), grid


def check_settings(processor: Any, vision: VisionConfig) -> None:
    """Raises UserError if the settings ask for other patches than the vision tower takes."""
    wanted = {
        **dict.fromkeys(("do_resize", "do_rescale", "do_normalize"), True),
        **dict(image_mean=PIXEL_MEAN, image_std=PIXEL_STD, rescale_factor=1 / 255),
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge_size,
    }
    for name, expected in wanted.items():
        if not _alike(found := getattr(processor, name), expected):
            raise UserError(
                f"the image processor's {name} is {found}, this model's {expected}; take the "
                "preprocessor_config.json of the same checkpoint"
            )
    if processor.resample not in list(Image.Resampling):
        raise UserError(
            f"the image processor's resample is {processor.resample}; expected the number of a "
            f"filter of Pillow, such as {Image.Resampling.BICUBIC} (bicubic)"
        )


def decode(data: bytes, where: str) -> Image.Image:
    """Decode to upright RGB; transparent parts become white, of an animation the first frame.

    Raises UserError, beginning with `where`, for what is broken, cut off, above `LARGEST` or grey
    without a fixed range.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > LARGEST:
            raise Image.DecompressionBombError(f"{image.width}×{image.height} pixels")
        image.load()
        turn = _turn(image)
        image = _to_rgb(image)
        return image if turn is None else image.transpose(turn)
    except _BOMB as error:
        raise UserError(
            f"{where}: the image is above the limit of {LARGEST} pixels ({error}); "
            "shrink the picture or drop the row"
        ) from error
    except BROKEN as error:
        raise UserError(
            f"{where}: the image cannot be decoded ({type(error).__name__}: {error}); "
            "replace the picture or drop the row"
        ) from error


def as_png(data: bytes, size: tuple[int, int], processor: Any, where: str) -> bytes:
    """The picture as `patches` cuts it, `size` = (width, height) pixels: no processor that allows
    this size resizes it again, so that a server sees the trainer's pixels.

    A plain PNG of this size stays as it is. Raises UserError as `decode`.
    """
    if data.startswith(b"\x89PNG") and not any(chunk in data for chunk in _MAY_TURN):
        image = Image.open(io.BytesIO(data))
        if image.mode == "RGB" and image.size == size and "transparency" not in image.info:
            return data
    picture = resize.joined(_strips(decode(data, where), size, processor))
    picture.save(buffer := io.BytesIO(), "PNG", compress_level=1)
    return buffer.getvalue()


def pixel_limits(
    processor: Qwen2VLImageProcessorPil, min_pixels: int | None, max_pixels: int | None
) -> tuple[int, int]:
    """The least and the largest area, the checkpoint's where None; UserError if in wrong order."""
    low = min_pixels or processor.size["shortest_edge"]
    high = max_pixels or processor.size["longest_edge"]
    if low is None or high is None:
        raise UserError(
            f"the image processor's size is {processor.size}, without the areas shortest_edge and "
            "longest_edge; set data.min_pixels and data.max_pixels, or mend the checkpoint's "
            "preprocessor_config.json"
        )
    if low > high:
        raise UserError(
            f"data.min_pixels={low} exceeds data.max_pixels={high}; choose limits in order "
            "(one that is not given is the checkpoint's)"
        )
    return low, high


def target_size(size: tuple[int, int], unit: int, limits: tuple[int, int]) -> tuple[int, int]:
    """(width, height) as Qwen2-VL resizes it: multiples of `unit` with an area inside `limits`.

    Below the least area sides are rounded up and above the largest down, so that it is reached;
    a very thin picture keeps one unit across and may stay outside.
    """
    width, height = size
    low, high = limits
    sides = [round(side / unit) for side in size]
    if math.prod(sides) * unit**2 > high:
        shrink = math.sqrt(height * width / high)
        sides = [max(1, math.floor(side / shrink / unit)) for side in size]
    elif math.prod(sides) * unit**2 < low:
        grow = math.sqrt(low / (height * width))
        sides = [math.ceil(side * grow / unit) for side in size]
    return sides[0] * unit, sides[1] * unit


def _turn(image: Image.Image) -> Image.Transpose | None:
    """How a loaded picture is made upright, as `ImageOps.exif_transpose` does it.

    That writes EXIF anew besides, which fails where a value is odd. EXIF that cannot be read tells
    no orientation.
    """
    try:
        return _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except BROKEN:
        return None


def _alike(found: Any, expected: Any) -> bool:
    try:
        return np.shape(found) == np.shape(expected) and np.allclose(found, expected, rtol=1e-5)
    except (TypeError, ValueError):  # no numbers
        return False


def _grey_of_16_bits(image: Image.Image) -> Image.Image:
    """8 bits of what Pillow would clip at 255; TIFF has scans of 12 bits, and negatives."""
    values, bits = np.asarray(image), 16
    see_through = image.info.get("transparency") == values
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0]
        if image.tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == WHITE_IS_ZERO:
            values = 2**bits - 1 - values
    values = np.where(see_through, 255, values >> bits - 8)
    return Image.fromarray(values.astype(np.uint8))


def _to_rgb(image: Image.Image) -> Image.Image:
    # Mode I holds 32 bits, of these formats 16.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _grey_of_16_bits(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"grey of mode {image.mode} has no fixed range: save it with 8 or 16 bits per channel"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB one


def _patches(
    picture: Image.Image, processor: Any, limits: tuple[int, int], where: str
) -> tuple[UInt8[np.ndarray, "patches patch"], tuple[int, int, int]]:
    if max(picture.size) > THINNEST * min(picture.size):
        raise UserError(
            f"{where}: an image of {picture.width}×{picture.height} pixels is too narrow; "
            f"crop it to an aspect ratio below {THINNEST}"
        )
    side, unit = processor.patch_size, processor.patch_size * processor.merge_size
    size = target_size(picture.size, unit, limits)
    across, down = (pixels // side for pixels in size)
    out = np.empty((across * down, 3, processor.temporal_patch_size, side, side), np.uint8)
    start = 0
    for strip in _strips(picture, size, processor):
        stop = start + len(strip) // side * across
        _cut(resize.planes(strip), processor, out[start:stop])
        start = stop
    return out.reshape(len(out), math.prod(out.shape[1:])), (1, down, across)


def _strips(picture: Image.Image, size: tuple[int, int], processor: Any) -> Iterator[resize.Strip]:
    """The picture of this size, from the top in strips of four rows of tokens."""
    method = Image.Resampling(processor.resample)
    if method is not Image.Resampling.BICUBIC:
        picture = picture.resize(size, method)
    return resize.bicubic(picture, size, rows=4 * processor.patch_size * processor.merge_size)


def _cut(
    planes: UInt8[np.ndarray, "channels height width"],
    processor: Any,
    out: UInt8[np.ndarray, "patches channels frames rows columns"],
) -> None:
    """Writes the patches: unit by unit, row-major, and so inside a unit; frames repeat.

    A row of a patch is moved as one item of `side` bytes, which NumPy copies at once.
    """
    side, merge = processor.patch_size, processor.merge_size
    down, across = (pixels // side // merge for pixels in planes.shape[1:])
    row = np.dtype((np.void, side))
    target = out.view(row).reshape(down, across, merge, merge, *out.shape[1:4])
    for channel, plane in enumerate(planes):
        source = plane.view(row).reshape(down, merge, side, across, merge)
        target[..., channel, :, :] = source.transpose(0, 3, 1, 4, 2)[..., None, :]
