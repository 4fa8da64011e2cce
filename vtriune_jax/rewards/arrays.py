"""What NumPy and JAX have in common, so that every reward is written once.

Under `jax.jit` a reward runs on accelerators and inside a training step. A verifier's worker calls
the same lines with NumPy arrays: it starts without JAX and has nothing to compile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any
"""An array of NumPy or JAX, for shape annotations; `jaxtyping.Array` would import JAX."""


def namespace(array: Array) -> Any:
    """`numpy` or `jax.numpy`, whichever the array is of (a plain number: NumPy).

    Both follow the array API standard, and the rewards use what it defines.
    """
    return array.__array_namespace__() if hasattr(array, "__array_namespace__") else np


def scan(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    along: tuple[Array, ...],
    reverse: bool = False,
) -> tuple[Any, Any]:
    """`jax.lax.scan` over the first axis of the arrays: the last carry and the stacked outputs.

    `step` returns the next carry and a tuple of arrays. NumPy takes the steps one by one: a step
    works on the whole batch.
    """
    if not isinstance(along[0], np.ndarray):
        from jax import lax  # not above: workers have no JAX

        return lax.scan(step, carry, along, reverse=reverse)
    outputs = []
    parts = list(zip(*along, strict=True))
    for part in reversed(parts) if reverse else parts:
        carry, output = step(carry, part)
        outputs.append(output)
    outputs = reversed(outputs) if reverse else outputs
    return carry, tuple(np.stack(each) for each in zip(*outputs, strict=True))


def ranked(
    values: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """Values and thresholds ≥ 0 as ranks that compare alike, and the way back to the values.

    Small integers are as exact as float64 and faster to compare. No two are the same, of equal
    values the first has the highest, and what is below all thresholds has −1.
    """
    flat = values.ravel()
    places = np.flatnonzero(flat >= np.fmin.reduce(thresholds, axis=None))[::-1]
    order = np.argsort(flat[places], kind="stable")
    ordered = flat[places[order]]
    small = np.int16 if len(order) < 2**15 - 1 else np.int32
    ranks = np.full(flat.shape, -1, small)
    ranks[places[order]] = np.arange(len(order))
    # a threshold of NaN is beyond the end: none reaches it
    least = np.searchsorted(ordered, thresholds).astype(small)
    ordered_and_none = np.append(ordered, np.zeros(1, flat.dtype))
    return ranks.reshape(values.shape), least, ordered_and_none.__getitem__


def masked(values: Array, mask: Array) -> Array:
    """Values in 0…1 where the mask is set, something negative elsewhere."""
    if isinstance(values, np.ndarray):
        return values - 2.0 * ~mask  # several times faster than np.where
    return namespace(values).where(mask, values, -1)


def first(mask: Array, axis: int) -> tuple[Array, Array]:
    """Of what is True along an axis only the first, and where that is (anywhere if nowhere).

    For JAX only.
    """
    xp = namespace(mask)
    n = mask.shape[axis]
    places = xp.arange(n, dtype=xp.int32).reshape(-1, *[1] * (mask.ndim - 1 - axis % mask.ndim))
    place = xp.where(mask, places, n).min(axis, initial=n)
    return xp.expand_dims(place, axis) == places, place


def stable_order(values: Array) -> Array:
    """`argsort(values, stable=True)` along the last axis, for up to hundreds of values.

    Where XLA sorts rows of a few values a CPU takes ten times as long as for comparing them all.
    """
    if isinstance(values, np.ndarray):
        return np.argsort(values, axis=-1, stable=True)
    from jax import lax
    from jax import numpy as jnp

    values = jnp.moveaxis(values, -1, 0)
    n, zeros = len(values), jnp.zeros(values.shape, jnp.int32)
    places = jnp.arange(n).reshape(-1, *[1] * (values.ndim - 1))

    def count(k: Array, before: Array) -> Array:
        return before + ((values[k] < values) | ((values[k] == values) & (k < places)))

    def invert(k: Array, order: Array) -> Array:
        return jnp.where(ranks[k] == places, k, order)

    ranks = lax.fori_loop(0, n, count, zeros)
    return jnp.moveaxis(lax.fori_loop(0, n, invert, zeros), 0, -1)


def batch_last(array: Array, axes: int) -> Array:
    """[*batch, a, b, …] → [a, b, …, batch], the last `axes` axes in front and the batch flat.

    So laid out, a loop over boxes takes long, contiguous steps over the images: several times
    faster on CPUs, for both libraries.
    """
    xp = namespace(array)
    batch, own = array.shape[: array.ndim - axes], array.shape[array.ndim - axes :]
    flat = array.reshape(math.prod(batch), *own)
    moved = xp.moveaxis(flat, 0, -1)
    return np.ascontiguousarray(moved) if isinstance(moved, np.ndarray) else moved


def batch_first(array: Array, batch: tuple[int, ...]) -> Array:
    """The inverse of `batch_last`: [a, b, …, batch] → [*batch, a, b, …]."""
    moved = namespace(array).moveaxis(array, -1, 0)
    return moved.reshape(*batch, *moved.shape[1:])


def in_chunks(function: Callable[..., Any], rows: int) -> Callable[..., Any]:
    """The same function of a batch, judged `rows` at a time under `jax.jit`.

    On CPUs what it computes in between then stays in the cache; with thousands of images that is
    several times faster. The size of the batch must be a multiple of `rows`.
    """
    import jax
    from jax import numpy as jnp

    def chunked(*args: Any) -> Any:
        # the rows of a chunk come last in memory, as `batch_last` wants them
        split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, rows, *x.shape[1:]), 1, -1), args)
        found = jax.lax.map(
            lambda chunk: function(*jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), chunk)), split
        )
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    return chunked
