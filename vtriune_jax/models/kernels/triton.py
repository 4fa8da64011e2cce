"""Attention on GPUs by JAX's Pallas kernel for Triton: any segments, no [tokens, tokens]."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vtriune_jax.models.kernels.slots import attend_apart

with warnings.catch_warnings():
    # JAX 0.11 recommends tokamax, which is not ready for use, and means to drop Pallas for Triton.
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha

BLOCK, SMALL_BLOCK = 128, 64
"""Queries that are looked at together in the forward pass, and all other blocks; rows are filled up
to a multiple of the former. Chosen on an H200, with WARPS."""
WARPS = 4


def attention(
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Int[Array, "rows tokens"],
    *,
    causal: bool,
    slots: tuple[int, int] | None = None,
    interpret: bool = False,
) -> Float[Array, "rows tokens heads head_dim"]:
    """As `models.attention.attention`.

    The kernel wants as many heads of keys as of queries and powers of two as `head_dim`: heads are
    repeated and filled up. Padding sees padding. Of float32 it multiplies the leading bits only
    (TF32), as Triton does.
    """
    if slots:
        whole = partial(attention, causal=causal, interpret=interpret)
        return attend_apart(whole, query, key, value, segments, slots)
    tokens, heads, head_dim = query.shape[1:]
    copies = heads // key.shape[2]
    more = -tokens % BLOCK
    wider = (1 << (head_dim - 1).bit_length()) - head_dim

    def prepare(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, more), (0, 0), (0, wider)])

    out: Any = mha(
        prepare(query),
        prepare(jnp.repeat(key, copies, axis=2)),
        prepare(jnp.repeat(value, copies, axis=2)),
        jnp.pad(segments, [(0, 0), (0, more)]),
        sm_scale=head_dim**-0.5,
        causal=causal,
        block_sizes=BlockSizes(BLOCK, *[SMALL_BLOCK] * 5),
        num_warps=WARPS,
        interpret=interpret,
    )
    return out[:, :tokens, :, :head_dim]
