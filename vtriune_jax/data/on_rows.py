"""Rows of an array chosen anew, each device with its share of them.

Indexed the plain way, an array that is cut over devices by rows comes out whole on each of them:
for the image features of a large batch that is more memory than a device has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding


def take(arrays: Sequence[Any], index: np.ndarray) -> Any:
    """`concatenate(arrays)[index]`, NumPy's or JAX's as `arrays` are.

    Rows that are only repeated in order stay on their devices; for others every device has all
    rows of `arrays` for a moment.
    """
    if isinstance(arrays[0], np.ndarray):
        return np.concatenate(arrays)[index]
    rows = sum(map(len, arrays))
    place = _place(arrays[0])
    times = len(index) // rows
    if np.array_equal(index.ravel(), np.repeat(np.arange(rows), times)):
        return _repeat(place, times, index.ndim)(arrays)
    return _take(place)(arrays, index)


def part(array: Any, parts: int, k: int) -> Any:
    """The k-th of `parts` equal parts of the rows, in order."""
    if parts == 1:
        return array
    if isinstance(array, np.ndarray):
        return np.split(array, parts)[k]
    return _part(_place(array), parts, k)(array)


def every(array: Any, parts: int, k: int) -> Any:
    """Every `parts`-th row, beginning with the k-th: of each device's own."""
    if parts == 1:
        return array
    if isinstance(array, np.ndarray):
        return array[k::parts]
    return _every(_place(array), parts, k)(array)


def _place(array: jax.Array) -> Sharding:
    """Where rows taken from an array lie: cut as its own are, and not otherwise."""
    own = array.sharding
    if isinstance(own, NamedSharding):
        return NamedSharding(own.mesh, PartitionSpec(*own.spec[:1]))
    return own


@functools.cache
def _take(place: Sharding) -> Callable[..., jax.Array]:
    return jax.jit(
        lambda arrays, index: jnp.take(jnp.concatenate(arrays), index, axis=0), out_shardings=place
    )


@functools.cache
def _repeat(place: Sharding, times: int, index_rank: int) -> Callable[..., jax.Array]:
    def repeat(arrays: Sequence[jax.Array]) -> jax.Array:
        rows = jnp.repeat(jnp.concatenate(arrays), times, axis=0)
        return rows.reshape(len(rows), *[1] * (index_rank - 1), *rows.shape[1:])

    return jax.jit(repeat, out_shardings=place)


@functools.cache
def _part(place: Sharding, parts: int, k: int) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda array: jnp.split(array, parts)[k], out_shardings=place)


@functools.cache
def _every(place: Sharding, parts: int, k: int) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(
        lambda array: array.reshape(-1, parts, *array.shape[1:])[:, k], out_shardings=place
    )
