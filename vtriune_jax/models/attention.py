"""Attention: the only place where queries meet keys, so the only place that chooses kernels."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

QUERIES = 128
"""Queries that look at their keys together, at least: causal ones skip the keys behind them."""
BLOCKS = 8
"""Such blocks of queries at most; each is compiled."""
MASKED = -1e30
"""Finite, so that a token that sees nothing gets a finite, if meaningless, result."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KV:
    """Keys and values of one layer, after the rotary embedding: laid out as `decode_attention`
    multiplies them, which on CPUs is three times as fast as the other way round."""

    keys: Float[Array, "*rows head_dim tokens"]
    values: Float[Array, "*rows tokens head_dim"]


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
    key: Float[Array, "groups n kv_heads head_dim"],
    value: Float[Array, "groups n kv_heads head_dim"],
    prompt: KV,
    prompt_segments: Int[Array, "groups tokens"],
    own: KV,
    index: Int[Array, ""],
) -> Float[Array, "groups n heads head_dim"]:
    """Attend from one new token to the group's prompt, the completion's tokens < index and itself.

    The prompt's keys are read once for all n completions of the group.
    """
    (groups, n, _, head_dim), kv_heads = query.shape, key.shape[2]
    grouped = (query * head_dim**-0.5).reshape(groups, n, kv_heads, -1, head_dim)
    grouped = grouped.swapaxes(1, 2)  # groups kv_heads n heads/kv_heads head_dim
    key, value = (x.swapaxes(1, 2)[:, :, :, None] for x in (key, value))
    merged = groups, kv_heads, -1, head_dim
    shape = grouped.shape[:-1]

    matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)
    to_prompt = matmul(grouped.reshape(merged), prompt.keys).reshape(*shape, -1)
    to_prompt = jnp.where((prompt_segments != 0)[:, None, None, None], to_prompt, -jnp.inf)
    to_own = matmul(grouped, own.keys)
    to_own = jnp.where(jnp.arange(to_own.shape[-1]) < index, to_own, -jnp.inf)
    to_itself = (grouped * key).sum(-1, keepdims=True, dtype=jnp.float32)
    logits = to_prompt, to_own, to_itself

    top = reduce(jnp.maximum, (x.max(-1, keepdims=True) for x in logits))
    weights = [jnp.exp(x - top) for x in logits]
    total = sum(x.sum(-1, keepdims=True) for x in weights)
    on_prompt, on_own, on_itself = (x.astype(value.dtype) for x in weights)
    out = matmul(on_prompt.reshape(*merged[:-1], on_prompt.shape[-1]), prompt.values)
    out = out.reshape(grouped.shape) + matmul(on_own, own.values) + on_itself * value
    return (out / total).astype(value.dtype).swapaxes(1, 2).reshape(query.shape)
