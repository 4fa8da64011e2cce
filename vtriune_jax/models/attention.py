"""Attention: the only place where queries meet keys, so the only place that chooses kernels."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERIES = 128
"""Queries that look at their keys together, at least: causal ones skip the keys behind them."""
BLOCKS = 8
"""Such blocks of queries at most; each is compiled."""
MASKED = -1e30
"""Finite, so that a token that sees nothing gets a finite, if meaningless, result."""


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

    Queries are taken in blocks and, when causal, look at no keys behind their block: about half the
    work and, since the backward pass computes the weights again, a fraction of the memory.
    """
    rows, tokens, _, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = (query * head_dim**-0.5).reshape(rows, tokens, kv_heads, -1, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # rows kv_heads heads/kv_heads tokens head_dim
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    size = max(QUERIES, -(-tokens // BLOCKS))
    done = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        seen = end if causal else tokens
        mask = segments[:, start:end, None] == segments[:, None, :seen]
        mask &= (segments != 0)[:, None, :seen]
        if causal:
            mask &= jnp.arange(seen) <= jnp.arange(start, end)[:, None]
        done.append(
            _attend(grouped[:, :, :, start:end], key[:, :, :seen], value[:, :, :seen], mask)
        )
    out = jnp.concatenate(done, axis=3).transpose(0, 3, 1, 2, 4)
    return out.reshape(query.shape)


@partial(jax.checkpoint, prevent_cse=False)
def _attend(
    query: Float[Array, "rows kv_heads group queries head_dim"],
    key: Float[Array, "rows kv_heads keys head_dim"],
    value: Float[Array, "rows kv_heads keys head_dim"],
    mask: Bool[Array, "rows queries keys"],
) -> Float[Array, "rows kv_heads group queries head_dim"]:
    """softmax(query · key) · value; the heads of a group share one matmul."""
    *_, group, queries, head_dim = query.shape
    flat = query.reshape(*key.shape[:2], group * queries, head_dim)
    logits = jnp.einsum("rkqd,rktd->rkqt", flat, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(*query.shape[:-1], -1)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum(
        "rkqt,rktd->rkqd",
        weights.reshape(*flat.shape[:-1], -1).astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (out.reshape(query.shape) / total).astype(value.dtype)


def decode_attention(
    query: Float[Array, "groups n heads head_dim"],
    new_key: Float[Array, "groups n kv_heads head_dim"],
    new_value: Float[Array, "groups n kv_heads head_dim"],
    prompt_key: Float[Array, "groups kv_heads tokens head_dim"],
    prompt_value: Float[Array, "groups kv_heads tokens head_dim"],
    prompt_segments: Int[Array, "groups tokens"],
    key: Float[Array, "groups n kv_heads completion head_dim"],
    value: Float[Array, "groups n kv_heads completion head_dim"],
    index: Int[Array, ""],
) -> Float[Array, "groups n heads head_dim"]:
    """Attend from one new token to the group's prompt, the completion's tokens < index and itself.

    The prompt's keys are read once for all n completions of the group.
    """
    groups, n, heads, head_dim = query.shape
    kv_heads, tokens = prompt_key.shape[1:3]
    query = query.reshape(groups, n, kv_heads, heads // kv_heads, head_dim) * head_dim**-0.5
    logits = jnp.concatenate(
        [
            jnp.einsum("gnkqd,gktd->gnkqt", query, prompt_key),
            jnp.einsum("gnkqd,gnkcd->gnkqc", query, key),
            jnp.einsum("gnkqd,gnkd->gnkq", query, new_key)[..., None],
        ],
        axis=-1,
        dtype=jnp.float32,
    )
    own = jnp.broadcast_to(jnp.arange(key.shape[3]) < index, (groups, key.shape[3]))
    seen = jnp.concatenate([prompt_segments != 0, own, jnp.ones((groups, 1), bool)], axis=-1)
    logits = jnp.where(seen[:, None, None, None], logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    out = jnp.einsum("gnkqt,gktd->gnkqd", weights[..., :tokens], prompt_value)
    out += jnp.einsum("gnkqc,gnkcd->gnkqd", weights[..., tokens:-1], value)
    out += weights[..., -1:] * new_value[:, :, :, None]
    return out.reshape(groups, n, heads, head_dim)
