"""Attention on NVIDIA GPUs by cuDNN, for rows that are one sequence each."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtriune_jax.errors import UserError
from vtriune_jax.models.kernels import triton
from vtriune_jax.models.kernels.slots import attend_apart

Implementation = Literal["cudnn", "xla"]
"""Of `jax.nn.dot_product_attention`; the second one is for tests without a GPU."""


def attention(
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Int[Array, "rows tokens"],
    *,
    causal: bool,
    slots: tuple[int, int] | None = None,
    implementation: Implementation = "cudnn",
    packed: Callable[..., Array] = triton.attention,
) -> Float[Array, "rows tokens heads head_dim"]:
    """As `models.attention.attention`.

    Public JAX gives cuDNN no segments, only lengths counted from the left (a mask would be an array
    of [tokens, tokens], and causality would spare nothing). So padding, wherever it stands, moves
    behind the row's tokens, and back. Rows with slots are one sequence for each slot; where any
    other row here has two segments, all go the `packed` way. Raises UserError for float32, which
    cuDNN does not know.
    """
    if implementation == "cudnn" and query.dtype == jnp.float32:
        raise UserError(
            'model.attention="cudnn" needs model.dtype="bfloat16", not "float32"; choose "triton"'
        )
    run = partial(_by_lengths, causal=causal, implementation=implementation)
    if slots:
        return attend_apart(run, query, key, value, segments, slots)
    real = segments != 0
    single = jnp.where(real, segments == segments.max(1, keepdims=True), True).all()
    return jax.lax.cond(single, run, partial(packed, causal=causal), query, key, value, segments)


def _by_lengths(
    query: Array,
    key: Array,
    value: Array,
    segments: Int[Array, "rows tokens"],
    *,
    causal: bool,
    implementation: Implementation,
) -> Array:
    real = segments != 0
    order = jnp.argsort(~real, axis=1, stable=True)  # the row's tokens, then the padding
    lengths = jnp.maximum(real.sum(1, dtype=jnp.int32), 1)  # a sum over no keys is no number
    out = jax.nn.dot_product_attention(
        _take(query, order),
        _take(key, order),
        _take(value, order),
        is_causal=causal,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    out = _take(out, jnp.argsort(order, axis=1))
    return jnp.where(real[:, :, None, None], out, 0)


@jax.vmap
def _take(x: Float[Array, "tokens heads head_dim"], order: Int[Array, " tokens"]) -> Array:
    """The tokens in another order; `order` names each once, which spares atomic additions."""
    return x.at[order].get(unique_indices=True, mode="promise_in_bounds")
