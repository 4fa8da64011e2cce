"""Completion slots for kernels that know of none: a row for each, behind a copy of the prompt."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Attention = Callable[[Array, Array, Array, Array], Array]


def attend_apart(
    run: Attention,
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Int[Array, "rows tokens"],
    slots: tuple[int, int],
) -> Float[Array, "rows tokens heads head_dim"]:
    """What the causal `run(query, key, value, segments)` makes of the n sequences of each row.

    The attention then costs what it does in n rows, the prompt's n times; all else of the layer is
    still shared.
    """
    n, size = slots
    rows, tokens = segments.shape
    prompt = tokens - n * size

    def apart(x: Array) -> Array:
        own = x[:, prompt:].reshape(rows * n, size, *x.shape[2:])
        return jnp.concatenate([jnp.repeat(x[:, :prompt], n, axis=0), own], axis=1)

    out = run(*map(apart, (query, key, value, segments)))
    own = out[:, prompt:].reshape(rows, n * size, *out.shape[2:])
    return jnp.concatenate([out[::n, :prompt], own], axis=1)
