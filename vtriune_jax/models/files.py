"""One safetensors file: what is in it, a part of one of its tensors, and writing one.

The library checks a file as it opens it. Reading and writing the numbers is done here: its readers
map files into memory, where every page that was touched stays until the file is closed, and its
writer takes all tensors of a file at once. Here no more than one tensor is in memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import xxhash
from safetensors import SafetensorError, safe_open

from vtriune_jax.errors import UserError

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
BAND = 16 * 1024**2
"""Bytes read at once."""
PIECE = 1024**2
"""Bytes written at once, few enough to be in a cache still after their checksum was taken."""
ALIGNMENT = 64
"""Of arrays that JAX takes over on CPUs as they are, without copying them."""


class Tensor(NamedTuple):
    """One tensor of a file: where it is and what it looks like."""

    file: Path
    key: str
    dtype: str
    """As the file names it: F32, BF16, …"""
    shape: tuple[int, ...]
    start: int
    """Its first byte in the file."""


def contents(file: Path) -> list[Tensor]:
    """The tensors of a file. Raises UserError if it is missing, damaged or cut short."""
    try:
        with safe_open(file, framework="np"):  # checks the header, and the length against it
            pass
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
    except FileNotFoundError:
        raise UserError(f"{file} is missing; copy the whole checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read ({error}); copy it again") from None
    header.pop("__metadata__", None)
    return [
        Tensor(file, key, of["dtype"], tuple(of["shape"]), 8 + length + of["data_offsets"][0])
        for key, of in header.items()
    ]


def read(tensor: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """A rectangular part of a tensor, in the file's dtype.

    It takes no more host memory than that part and two bands of rows of the file.
    """
    dtype = DTYPES[tensor.dtype]
    spans = [range(*part.indices(size)) for part, size in zip(index, tensor.shape, strict=True)]
    part = _empty([len(span) for span in spans], dtype)
    width = math.prod(tensor.shape[1:]) * dtype.itemsize
    band = max(1, BAND // width)
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start + spans[0].start * width)
        for first in range(0, len(part), band):
            rows = min(band, len(part) - first)
            numbers = np.fromfile(stream, np.uint8, rows * width).view(dtype)
            numbers = numbers.reshape(rows, *tensor.shape[1:])
            part[first : first + rows] = numbers[(slice(None), *index[1:])]
    return part


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same shape and numbers, whatever their dtypes; a band of each
    is in memory."""
    if one.shape != other.shape or not {one.dtype, other.dtype} <= DTYPES.keys():
        return False
    rows = max(1, BAND // (math.prod(one.shape[1:]) * 4))
    everything = [slice(None)] * (len(one.shape) - 1)
    return all(
        np.array_equal(read(one, (band, *everything)), read(other, (band, *everything)))
        for band in (slice(row, row + rows) for row in range(0, one.shape[0], rows))
    )


class Written(NamedTuple):
    """What a file that was written is like, to find out later whether it still is."""

    size: int
    xxh3: str
    """XXH3 of 64 bits: at several times the speed of memory files, unlike CRC-32."""


class Writer:
    """A file of tensors of one dtype, which come in the order of `shapes`, whole or in parts.

    The file is complete, and on disk, when the last part was added. Raises OSError.
    """

    def __init__(self, file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype):
        """Write the header."""
        name = next(name for name, known in DTYPES.items() if known == dtype)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for key, shape in shapes.items():
            start, end = end, end + math.prod(shape) * dtype.itemsize
            header[key] = {"dtype": name, "shape": shape, "data_offsets": (start, end)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the numbers start at a multiple of 8
        self._missing = end
        self._size, self._hash = 0, xxhash.xxh3_64()
        self._stream = file.open("wb")
        self._write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def add(self, part: np.ndarray) -> Written | None:
        """Write what comes next, of the file's dtype; after the last says what the file is like."""
        numbers = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        for start in range(0, len(numbers), PIECE):
            self._write(numbers[start : start + PIECE].data)
        self._missing -= len(numbers)
        if self._missing:
            return None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        return Written(self._size, self._hash.hexdigest())

    def _write(self, piece: bytes | memoryview) -> None:
        self._hash.update(piece)
        self._stream.write(piece)
        self._size += len(piece)


def _empty(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An aligned array."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    skipped = -memory.ctypes.data % ALIGNMENT
    return memory[skipped : skipped + size].view(dtype).reshape(shape)
