"""Rows that choose among columns one after the other, each the best one that is left.

The last axis is the batch.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float

from vtriune_jax.rewards.arrays import (
    Array,
    first,
    masked,
    namespace,
    put,
    repeat,
    scan,
    while_loop,
)

_BITS = 32


def in_turn(
    values: Float[Array, "rows columns batch"], least: Float[Array, "t batch"]
) -> Float[Array, "rows t batch"]:
    """What each row gets: the largest value in a column that no row before it took, or −1.

    At each of the thresholds `least` by itself: less than that is not taken. Of equal values the
    first is. A negative value is none, and a threshold of NaN is never reached.

    Few columns of a row reach a threshold. So these are first found, best ones first, for all rows
    and images at once; then each row tries its own against a bit mask of the columns taken.
    """
    xp = namespace(values)
    count, value, column = _preferences(masked(values, values >= lowest(least)))
    words = -(-values.shape[1] // _BITS)
    word, bit = column // _BITS, xp.astype(xp.left_shift(1, column % _BITS), xp.uint32)

    def take(taken: Array, row: tuple[Array, ...]) -> tuple[Array, tuple[Array]]:
        value, word, bit = row  # [preferences, batch]

        def prefer(k: Any, state: tuple[Array, Array]) -> tuple[Array, Array]:
            taken, got = state
            mine = bit[k] if words == 1 else xp.where(word[k] == each_word, bit[k], 0)
            free = ((taken & mine) == 0).all(axis=0) if words > 1 else (taken[0] & mine) == 0
            chosen = free & (got < 0) & (value[k] >= least)
            return taken | chosen * mine, xp.where(chosen, value[k], got)

        taken, got = repeat(count, prefer, (taken, xp.full_like(least, -1, dtype=values.dtype)))
        return taken, (got,)

    each_word = xp.arange(words).reshape(-1, 1, 1)
    taken = xp.zeros((words, *least.shape), dtype=xp.uint32)
    along = tuple(xp.moveaxis(each, 1, 0) for each in (value, word, bit))
    return scan(take, taken, along)[1][0]


def lowest(least: Float[Array, "t batch"]) -> Float[Array, " batch"]:
    """What reaches no threshold is below this."""
    xp = namespace(least)
    return xp.where(xp.isnan(least), xp.inf, least).min(axis=0)


def _preferences(values: Array) -> tuple[Any, Array, Array]:
    """How many columns a row has at most, and the columns of each row from the best to the worst.

    [preferences, rows, batch] their values and which they are; a negative value for none.
    """
    xp = namespace(values)
    rows, columns, batch = values.shape

    def unfinished(state: tuple[Any, ...]) -> Array:
        return (state[0] >= 0).any()

    def take(state: tuple[Any, ...]) -> tuple[Any, ...]:
        best, values, k, value, column = state
        place, index = first(values == xp.where(best >= 0, best, 2)[:, None], axis=1)
        values = masked(values, ~place)
        return values.max(axis=1), values, k + 1, put(value, k, best), put(column, k, index)

    value = xp.full((columns, rows, batch), -1, dtype=values.dtype)
    column = xp.zeros((columns, rows, batch), dtype=xp.int32)
    start = values.max(axis=1, initial=-1), values, 0, value, column
    _, _, count, value, column = while_loop(unfinished, take, start)
    return count, value, column
