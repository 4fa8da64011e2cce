"""Attention: the only place where queries meet keys, so the only place that chooses kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def attention(
    query: Float[Array, "rows tokens heads head_dim"],
    key: Float[Array, "rows tokens kv_heads head_dim"],
    value: Float[Array, "rows tokens kv_heads head_dim"],
    segments: Int[Array, "rows tokens"],
    *,
    causal: bool,
) -> Float[Array, "rows tokens heads head_dim"]:
    """Attend inside equal, non-zero segments, and only backwards when causal.

    A token of segment 0 (padding) sees nothing: its result is finite and meaningless.
    """
    mask = segments[:, :, None] == segments[:, None, :]
    mask &= (segments != 0)[:, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=mask[:, None], is_causal=causal)


def decode_attention(
    query: Float[Array, "groups n heads head_dim"],
    prompt_key: Float[Array, "groups kv_heads tokens head_dim"],
    prompt_value: Float[Array, "groups kv_heads tokens head_dim"],
    prompt_segments: Int[Array, "groups tokens"],
    key: Float[Array, "groups n kv_heads completion head_dim"],
    value: Float[Array, "groups n kv_heads completion head_dim"],
    index: Int[Array, ""],
) -> Float[Array, "groups n heads head_dim"]:
    """Attend from one new token to the group's prompt and to the completion's tokens ≤ index.

    The prompt's keys are read once for all n completions of the group.
    """
    groups, n, heads, head_dim = query.shape
    kv_heads, tokens = prompt_key.shape[1:3]
    query = query.reshape(groups, n, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    logits = jnp.concatenate(
        [
            jnp.einsum("gnkqd,gktd->gnkqt", query, prompt_key),
            jnp.einsum("gnkqd,gnkcd->gnkqc", query, key),
        ],
        axis=-1,
        dtype=jnp.float32,
    )
    own = jnp.broadcast_to(jnp.arange(key.shape[3]) <= index, (groups, key.shape[3]))
    seen = jnp.concatenate([prompt_segments != 0, own], axis=-1)
    logits = jnp.where(seen[:, None, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("gnkqt,gktd->gnkqd", weights[..., :tokens], prompt_value)
    out += jnp.einsum("gnkqc,gnkcd->gnkqd", weights[..., tokens:], value)
    return out.reshape(groups, n, heads, head_dim)
