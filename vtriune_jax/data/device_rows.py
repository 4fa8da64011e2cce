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
    rows, place = sum(map(len, arrays)), _place(arrays[0])
    times = len(index) // rows
    if np.array_equal(index.ravel(), np.repeat(np.arange(rows), times)):
        return _at(place, _repeat, times, index.ndim)(arrays)
    return _at(place, _take)(arrays, index)


def part(array: Any, parts: int, k: int) -> Any:
    """The k-th of `parts` equal parts of the rows, in order."""
    if parts == 1:
        return array
    if isinstance(array, np.ndarray):
        return np.split(array, parts)[k]
    return _at(_place(array), _part, parts, k)(array)


def _take(arrays: Sequence[jax.Array], index: jax.Array) -> jax.Array:
    return jnp.take(jnp.concatenate(arrays), index, axis=0)


def _repeat(times: int, index_rank: int, arrays: Sequence[jax.Array]) -> jax.Array:
    rows = jnp.repeat(jnp.concatenate(arrays), times, axis=0)
    return rows.reshape(len(rows), *[1] * (index_rank - 1), *rows.shape[1:])


def _part(parts: int, k: int, array: jax.Array) -> jax.Array:
    return jnp.split(array, parts)[k]


def _place(array: jax.Array) -> Sharding:
    """Where rows taken from an array lie: cut as its own are, and not otherwise."""
    own = array.sharding
    if isinstance(own, NamedSharding):
        return NamedSharding(own.mesh, PartitionSpec(*own.spec[:1]))
    return own


@functools.cache
def _at(place: Sharding, function: Callable[..., jax.Array], *first: int) -> Callable[..., Any]:
    """The function with its first arguments, jitted; its result lies at `place`."""
    return jax.jit(functools.partial(function, *first), out_shardings=place)
