"""Pillow's bicubic resize, equal in every bit and faster: benchmarks/images.py.

Transformers' processor of Qwen2-VL resizes with Pillow, and what the model has learnt from depends
on it to the last bit, so this is the same arithmetic: along each side an output pixel is

    clip((2²¹ + Σ_k w_k · p_k) >> 22),   w_k = round(2²² · weight_k),

with integer pixels p_k and the weights of the cubic convolution (a = −1/2) stretched by the factor
of shrinking, and what the first side gives is rounded before the second. Pillow weighs one pixel
after the other; here the weights of an output row or column are applied to a vector of pixels,
which Numba compiles to the vector instructions of the processor, without the interpreter's lock.
"""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int32, UInt32
from numba import njit
from PIL import Image

_BITS = 22
_HALF = 1 << (_BITS - 1)
_LANES = 16
"""Pixels of a column that are weighed at once along rows; four bytes each."""

_BICUBIC = Image.Resampling.BICUBIC

_compiled = functools.partial(njit, nogil=True, cache=os.access(Path(__file__).parent, os.W_OK))
"""Without the interpreter's lock; what is compiled is kept beside this file, if that can be."""

Strip = UInt32[np.ndarray, "rows width"]
"""Rows of an RGB picture, four bytes a pixel, of which the last means nothing."""


def bicubic(picture: Image.Image, size: tuple[int, int], rows: int) -> Iterator[Strip]:
    """`picture.resize(size, BICUBIC)` of an RGB picture, in strips of `rows` rows from the top.

    `size` = (width, height) pixels. Strips are small enough for the processor's cache. A Pillow
    that computes otherwise than those known here resizes by itself.
    """
    if picture.size != size and (order := _order()) is not None:
        yield from _resized(picture, size, rows, columns_first=order(picture.size, size))
        return
    if picture.size != size:
        picture = picture.resize(size, _BICUBIC)
    for top in range(0, size[1], rows):
        yield _pixels(picture, top, min(top + rows, size[1]))


def joined(strips: Iterable[Strip]) -> Image.Image:
    """The RGB picture that strips from the top make up."""
    pixels = np.concatenate(list(strips))
    return Image.frombytes("RGB", pixels.shape[::-1], pixels.data, "raw", "RGBX")


@_compiled()
def planes(strip):
    """[rows, width] pixels of four bytes to uint8 [3, rows, width]."""
    rows, width = strip.shape
    out = np.empty((3, rows, width), np.uint8)
    for y in range(rows):
        values = strip[y].view(np.uint8)
        for channel in range(3):
            plane = out[channel, y]
            for x in range(width):
                plane[x] = values[4 * x + channel]
    return out


def _resized(
    picture: Image.Image, size: tuple[int, int], rows: int, columns_first: bool
) -> Iterator[Strip]:
    across = _weights(picture.width, size[0])
    first, count, weights = _weights(picture.height, size[1])
    for top in range(0, size[1], rows):
        part = slice(top, top + rows)
        begin, end = first[part][0], first[part][-1] + weights.shape[1]
        pixels = _pixels(picture, begin, min(end, picture.height))
        down = (first[part] - begin, count[part], weights[part])
        if columns_first:
            yield _weigh_rows(_weigh_columns(pixels, *down), *across)
        else:
            yield _weigh_columns(_weigh_rows(pixels, *across), *down)


def _rows_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether a Pillow before 13 begins with columns: never."""
    return False


def _cheaper_first(old: tuple[int, int], new: tuple[int, int]) -> bool:
    """Whether Pillow 13 does: if the height shrinks by more than twice of what the width does."""
    return old[1] - new[1] > max(0, 2 * (old[0] - new[0]))


@functools.cache
def _order() -> Callable[[tuple[int, int], tuple[int, int]], bool] | None:
    """Tells for which sizes the installed Pillow begins with columns, found by trying; or None."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    sizes = ((60, 40), (30, 40), (70, 90), (70, 97), (64, 40), (60, 96))
    theirs = [picture.resize(size, _BICUBIC) for size in sizes]
    for order in (_cheaper_first, _rows_first):
        ours = [
            joined(_resized(picture, size, 32, columns_first=order(picture.size, size)))
            for size in sizes
        ]
        if ours == theirs:
            return order
    logging.warning("Pillow %s resizes in a way of its own: images take longer", Image.__version__)
    return None


@functools.lru_cache(maxsize=512)
def _weights(
    old: int, new: int
) -> tuple[Int32[np.ndarray, "new"], Int32[np.ndarray, "new"], Int32[np.ndarray, "new taps"]]:
    """The first pixel that each new one is made of, of how many it is made, and their weights.

    Weights are integers, 2²² is one, a multiple of four for each; beyond its pixels they are 0.
    """
    scale = old / new
    stretch = max(scale, 1.0)
    reach = 2 * stretch
    centre = (np.arange(new) + 0.5) * scale
    first = np.maximum((centre - reach + 0.5).astype(int), 0)
    count = np.minimum((centre + reach + 0.5).astype(int), old) - first
    tap = np.arange(4 * math.ceil(count.max() / 4))
    x = abs((tap + first[:, None] - centre[:, None] + 0.5) * (1 / stretch))
    near, far = (1.5 * x - 2.5) * x * x + 1, (((x - 5) * x + 8) * x - 4) * -0.5
    weight = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weight = np.where(tap < count[:, None], weight, 0.0)
    total = np.cumsum(weight, axis=1)[:, -1:]  # one after the other, as a loop adds
    weight = weight * (1 / total) * (1 << _BITS)
    whole = np.trunc(weight + np.copysign(0.5, weight))
    return first.astype(np.int32), count.astype(np.int32), whole.astype(np.int32)


def _pixels(picture: Image.Image, start: int, stop: int) -> Strip:
    rows = picture.crop((0, start, picture.width, stop)).tobytes("raw", "RGBX")
    return np.frombuffer(rows, np.uint32).reshape(stop - start, picture.width)


@_compiled()
def _weigh_rows(source, first, count, weights):
    """[rows, width] to [rows, new width] pixels of four bytes, `_LANES` rows at a time, turned."""
    height, width = source.shape
    out = np.empty((height, len(first)), np.uint32)
    turned = np.zeros((width + weights.shape[1], _LANES), np.uint32)
    columns = turned.view(np.uint8)
    done = np.empty(_LANES, np.uint32)
    sums = np.empty(4 * _LANES, np.int32)
    for top in range(0, height, _LANES):
        rows = min(_LANES, height - top)
        for left in range(0, width, _LANES):
            for y in range(rows):
                for x in range(left, min(left + _LANES, width)):
                    turned[x, y] = source[top + y, x]
        for x in range(out.shape[1]):
            _weigh(columns, first[x], count[x], weights[x], sums, done.view(np.uint8))
            for y in range(rows):
                out[top + y, x] = done[y]
    return out


@_compiled()
def _weigh_columns(source, first, count, weights):
    """[rows, width] to [new rows, width] pixels of four bytes."""
    out = np.empty((len(first), source.shape[1]), np.uint32)
    rows, results = source.view(np.uint8), out.view(np.uint8)
    sums = np.empty(rows.shape[1], np.int32)
    for y in range(len(out)):
        _weigh(rows, first[y], count[y], weights[y], sums, results[y])
    return out


@_compiled(inline="always")
def _weigh(vectors, first, count, weights, sums, out):
    """One output vector; four input vectors at a time, as most outputs have no more."""
    last = len(vectors) - 1
    for k in range(0, count, 4):
        a, b, c, d = weights[k], weights[k + 1], weights[k + 2], weights[k + 3]
        p, q = vectors[min(first + k, last)], vectors[min(first + k + 1, last)]
        r, s = vectors[min(first + k + 2, last)], vectors[min(first + k + 3, last)]
        for i in range(len(sums)):
            four = a * np.int32(p[i]) + b * np.int32(q[i]) + c * np.int32(r[i]) + d * np.int32(s[i])
            sums[i] = four + (sums[i] if k else _HALF)
    for i in range(len(sums)):
        out[i] = min(max(sums[i] >> _BITS, 0), 255)
