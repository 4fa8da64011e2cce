"""Rows that choose among columns one after the other, each the best one that is left.

The last axis is the batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Float

from vtriune_jax.rewards.arrays import Array, first, masked, namespace, ranked

_BITS = 32


def in_turn(
    values: Float[Array, "rows columns batch"], least: Float[Array, "t batch"]
) -> Float[Array, "rows t batch"]:
    """What each row gets: the largest value in a column that no row before it took, or −1.

    At each of the thresholds `least` by itself: less than that is not taken. Of equal values the
    first is. A negative value is none, and a threshold of NaN is never reached.
    """
    xp = namespace(values)
    if 0 in values.shape:
        return xp.full((len(values), *least.shape), -1, dtype=values.dtype)
    least = xp.maximum(least, 0)
    return (_by_rows if isinstance(values, np.ndarray) else _by_preferences)(values, least)


def lowest(least: Float[Array, "t batch"]) -> Float[Array, " batch"]:
    """What reaches no threshold is below this."""
    xp = namespace(least)
    return xp.where(xp.isnan(least), xp.inf, least).min(axis=0)


def _by_rows(values: np.ndarray, least: np.ndarray) -> np.ndarray:
    """For NumPy: row by row, all columns that are left at once."""
    ranks, least, value = ranked(values, least)
    free = np.ones((values.shape[1], *least.shape), bool)
    got = np.empty((len(values), *least.shape), values.dtype)
    for row, found in zip(ranks, got, strict=True):
        candidates = (row[:, None] + 1) * free  # several times faster than np.where
        best = candidates.max(axis=0, initial=0)
        hit = best > least
        free &= ~((candidates == best) & hit)
        found[:] = np.where(hit, value(best - 1), -1)
    return got


def _by_preferences(values: Array, least: Array) -> Array:
    """For JAX: few columns of a row reach a threshold, so these are first found, best ones first,
    for all rows and images at once; then each row tries its own against a bit mask of those taken.
    """
    from jax import lax  # not above: workers have no JAX
    from jax import numpy as jnp

    count, value, column = _preferences(masked(values, values >= lowest(least)))
    words = jnp.arange(-(-values.shape[1] // _BITS)).reshape(-1, 1, 1)
    word, bit = column // _BITS, jnp.left_shift(1, column % _BITS).astype(jnp.uint32)

    def take(taken: Array, row: tuple[Array, ...]) -> tuple[Array, Array]:
        value, word, bit = row  # [preferences, batch]

        def prefer(k: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            taken, got = state
            mine = bit[k] if len(words) == 1 else jnp.where(word[k] == words, bit[k], 0)
            chosen = ((taken & mine) == 0).all(axis=0) & (got < 0) & (value[k] >= least)
            return taken | chosen * mine, jnp.where(chosen, value[k], got)

        nothing = jnp.full(least.shape, -1, values.dtype)
        return lax.fori_loop(0, count, prefer, (taken, nothing))

    taken = jnp.zeros((len(words), *least.shape), jnp.uint32)
    along = tuple(jnp.moveaxis(each, 1, 0) for each in (value, word, bit))
    return lax.scan(take, taken, along)[1]


def _preferences(values: Array) -> tuple[Any, Array, Array]:
    """How many columns a row has at most, and the columns of each row from the best to the worst.

    [preferences, rows, batch] their values and which they are; a negative value for none.
    """
    from jax import lax
    from jax import numpy as jnp

    rows, columns, batch = values.shape

    def unfinished(state: tuple[Any, ...]) -> Array:
        return (state[0] >= 0).any()

    def take(state: tuple[Any, ...]) -> tuple[Any, ...]:
        best, values, k, value, column = state
        place, index = first(values == jnp.where(best >= 0, best, 2)[:, None], axis=1)
        values = masked(values, ~place)
        return values.max(axis=1), values, k + 1, value.at[k].set(best), column.at[k].set(index)

    value = jnp.full((columns, rows, batch), -1, values.dtype)
    column = jnp.zeros((columns, rows, batch), jnp.int32)
    start = values.max(axis=1, initial=-1), values, 0, value, column
    _, _, count, value, column = lax.while_loop(unfinished, take, start)
    return count, value, column
