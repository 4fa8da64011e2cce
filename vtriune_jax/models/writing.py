"""Our parameters → safetensors files in the hub's layout, by one process or by several at once.

A parameter is turned, cast and, where it lies on several hosts, made whole on the devices, layer by
layer. The next tensor is under way there while the last one goes to its file, so that the host
holds two of them at most. A parameter in the host's own memory, of a single CPU device, is read
where it is instead, and turned and cast band by band on the way to the file: a band stays in the
processor's cache until it is written, and takes no fresh memory as a whole matrix would.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from vtriune_jax.models import files
from vtriune_jax.models.weights import INDEX, SINGLE, Entry, entries, own_shape

Fetch = Callable[[str], jax.Array]
"""Path → parameter."""
Slot = tuple[int, ...]
"""Where a file stands among all files of a checkpoint."""


Item = TypeVar("Item")

BAND = 2 * 1024**2
"""Bytes of a tensor that are turned or cast at once, of a parameter in the host's memory."""
ROWS = 64
"""Rows of a matrix that are turned at once: more, and their lines drop out of the cache."""


class Part(NamedTuple):
    """One tensor of a file: which it is, and its shape there."""

    entry: Entry
    shape: tuple[int, ...]


class Report(NamedTuple):
    """What this process has written, and the seconds that it took."""

    files: dict[str, files.Written]
    gather: float
    """Waiting for the devices, copying from there, and turning what lies in the host's memory."""
    write: float
    """Checksums and writing, at the same time as the above."""


def write(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    fetch: Fetch,
    patch_shape: tuple[int, int, int, int],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> list[str]:
    """Write parameters, as `dtype`, and return the names of the files.

    `fetch` gives the parameter of a path and is called once for each, in the order of `shapes`.
    Raises OSError.
    """
    wanted = parts(shapes, patch_shape)
    slots = deal(wanted, dtype.itemsize, max_shard_bytes)
    names = name_slots(slots.values())
    if len(names) == 1:
        names = dict.fromkeys(names, SINGLE)
    placed = {key: names[slot] for key, slot in slots.items()}
    write_files(folder, wanted, placed, placed.values(), fetch, dtype)
    if len(names) == 1:
        return [SINGLE]
    (folder / INDEX).write_text(index(wanted, placed, dtype))
    return [*names.values(), INDEX]


def parts(
    shapes: Mapping[str, tuple[int, ...]], patch_shape: tuple[int, int, int, int]
) -> list[Part]:
    """The tensors that these parameters are written as.

    `patch_shape` is (channels, frames, rows, columns) of a patch, the kernel shape of the file's
    patch convolution.
    """

    def shape(entry: Entry) -> tuple[int, ...]:
        own = own_shape(entry, shapes)
        if entry.transform == "same":
            return own
        return (own[1], *patch_shape) if entry.transform == "flatten" else own[::-1]

    return [Part(entry, shape(entry)) for entry in entries(shapes)]


def deal(
    wanted: Sequence[Part], itemsize: int, max_shard_bytes: int, processes: int = 1
) -> dict[str, tuple[int, int]]:
    """Key → (the process that writes the tensor, the number of the file among that one's).

    In the order of the tensors each goes to the process that has least to write.
    """
    load, size, number = ([0] * processes for _ in range(3))
    slots = {}
    for part in wanted:
        process = load.index(min(load))
        nbytes = math.prod(part.shape) * itemsize
        if size[process] and size[process] + nbytes > max_shard_bytes:
            size[process] = 0
            number[process] += 1
        load[process] += nbytes
        size[process] += nbytes
        slots[part.entry.key] = (process, number[process])
    return slots


def name_slots(slots: Iterable[Slot]) -> dict[Slot, str]:
    """The names of the files, in the order of their slots."""
    ordered = sorted(set(slots))
    count = f"{len(ordered):05d}"
    return {slot: f"model-{i + 1:05d}-of-{count}.safetensors" for i, slot in enumerate(ordered)}


def index(wanted: Sequence[Part], placed: Mapping[str, str], dtype: np.dtype) -> str:
    """The text of the index file."""
    total = sum(math.prod(part.shape) for part in wanted) * dtype.itemsize
    return json.dumps({"metadata": {"total_size": total}, "weight_map": dict(placed)}, indent=2)


def write_files(
    folder: Path,
    wanted: Sequence[Part],
    placed: Mapping[str, str],
    mine: Container[str],
    fetch: Fetch,
    dtype: np.dtype,
    whole: Sharding | None = None,
) -> Report:
    """Write the files that are `mine`; `placed` says in which file a tensor goes.

    All processes must call this with the same tensors, in the same order, as each takes part in
    making every tensor whole: `whole` is the sharding that puts it on every device, needed when
    there are several processes. Their files grow side by side, each in the order of its tensors.

    Raises OSError, but only at the end, so that no other process waits for this one in vain.
    """
    contents: dict[str, dict[str, tuple[int, ...]]] = {}
    for part in wanted:
        contents.setdefault(placed[part.entry.key], {})[part.entry.key] = part.shape
    writers: dict[str, files.Writer] = {}
    done: dict[str, files.Written] = {}
    failed: list[OSError] = []
    seconds = {"gather": 0.0, "write": 0.0}

    def add(name: str, band: np.ndarray) -> None:
        start = time.monotonic()
        try:
            if name not in writers:
                writer = files.Writer(folder / name, contents[name], dtype)
                writers[name] = stack.enter_context(writer)
            if written := writers[name].add(band):
                done[name] = written
        except OSError as error:
            failed.append(error)
        seconds["write"] += time.monotonic() - start

    row = max((math.prod(part.shape[1:]) for part in wanted), default=0) * dtype.itemsize
    buffers = itertools.cycle([np.empty(max(BAND, row), np.uint8) for _ in range(2)])
    with ExitStack() as stack, ThreadPoolExecutor(1) as thread:
        adding: Future[None] | None = None
        start = time.monotonic()
        for part, array in _one_ahead(_tensors(wanted, fetch, dtype, whole)):
            name = placed[part.entry.key]
            if isinstance(array, jax.Array):
                array.block_until_ready()  # for others too: else this process would run far ahead
            if name not in mine or failed:
                continue
            for band in _bands(np.asarray(array), dtype, buffers):
                seconds["gather"] += time.monotonic() - start
                if adding:
                    adding.result()
                adding = thread.submit(add, name, band)
                start = time.monotonic()
        seconds["gather"] += time.monotonic() - start
        if adding:
            adding.result()
    if failed:
        raise failed[0]
    return Report(done, **seconds)


def _tensors(
    wanted: Sequence[Part], fetch: Fetch, dtype: np.dtype, whole: Sharding | None
) -> Iterator[tuple[Part, jax.Array | np.ndarray]]:
    """The tensors as the files have them, on their way from the devices, or as views of
    parameters that lie in this host's memory."""
    for path, group in itertools.groupby(wanted, key=lambda part: part.entry.path):
        param = fetch(path)
        device, *others = param.devices()
        if device.platform == "cpu" and not others:
            host = np.asarray(param)
            for part in group:
                tensor = host if part.entry.layer is None else host[part.entry.layer]
                yield part, tensor if part.entry.transform == "same" else tensor.T
            continue
        take = _taker(whole or _everywhere(param))
        for part in group:
            stack = param[None] if part.entry.layer is None else param
            yield part, take(stack, part.entry.layer or 0, part.entry.transform, part.shape, dtype)


def _bands(
    tensor: np.ndarray, dtype: np.dtype, buffers: Iterator[np.ndarray]
) -> Iterator[np.ndarray]:
    """The numbers of a tensor in the order and the dtype of a file: whole if they are so already,
    or as many rows at a time as the next buffer holds."""
    if tensor.dtype == dtype and tensor.flags.c_contiguous:
        yield tensor
        return
    tensor = tensor.reshape(len(tensor), -1)
    bits = np.dtype(f"u{dtype.itemsize}")  # which NumPy copies faster than bfloat16
    if tensor.dtype == dtype:
        tensor, dtype = tensor.view(bits), bits
    width, first = tensor.shape[1], 0
    while first < len(tensor):
        buffer = next(buffers).view(bits)
        part = tensor[first : first + len(buffer) // width]
        band = buffer[: part.size].reshape(part.shape)
        for start in range(0, width, ROWS):
            columns = slice(start, start + ROWS)
            # First close together: rows a power of two apart would drive each other out of a cache.
            band[:, columns] = part[:, columns].astype(dtype).view(bits)
        yield band
        first += len(part)


def _everywhere(param: jax.Array) -> Sharding | None:
    """Where every process has a whole tensor of a parameter that lies on several."""
    if param.is_fully_addressable or not isinstance(param.sharding, NamedSharding):
        return None
    return NamedSharding(param.sharding.mesh, PartitionSpec())


def _one_ahead(arrays: Iterator[Item]) -> Iterator[Item]:
    """The same, each given when the next one is begun."""
    held = next(arrays)
    for item in arrays:
        yield held
        held = item
    yield held


@functools.cache
def _taker(whole: Sharding | None) -> Callable[..., jax.Array]:
    """What makes the tensor of a file from one layer of a parameter."""

    @functools.partial(jax.jit, static_argnums=(2, 3, 4), out_shardings=whole)
    def take(
        stack: jax.Array, layer: int, transform: str, shape: tuple[int, ...], dtype: np.dtype
    ) -> jax.Array:
        tensor = jax.lax.dynamic_index_in_dim(stack, layer, 0, keepdims=False).astype(dtype)
        return (tensor if transform == "same" else tensor.T).reshape(shape)

    return take
