"""Attention by XLA's own matrix products: runs everywhere, and is what CPUs are best at."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vtriune_jax.models.platform import platform

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
    slots: tuple[int, int] | None = None,
) -> Float[Array, "rows tokens heads head_dim"]:
    """As `models.attention.attention`.

    Queries are taken in blocks and, when causal, look at no keys behind their block: about half the
    work and, since the backward pass computes the weights again, a fraction of the memory.
    """
    rows, tokens, _, head_dim = query.shape
    kv_heads = key.shape[2]
    grouped = (query * head_dim**-0.5).reshape(rows, tokens, kv_heads, -1, head_dim)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # rows kv_heads heads/kv_heads tokens head_dim
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    if slots is None:
        done = _whole_rows(grouped, key, value, segments, causal)
    elif causal:
        done = _with_slots(grouped, key, value, segments, slots)
    else:
        raise ValueError("slots are of causal attention only")
    return jnp.concatenate(done, axis=3).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def _whole_rows(
    query: Float[Array, "rows kv_heads group tokens head_dim"],
    key: Float[Array, "rows kv_heads tokens head_dim"],
    value: Float[Array, "rows kv_heads tokens head_dim"],
    segments: Int[Array, "rows tokens"],
    causal: bool,
) -> list[Float[Array, "rows kv_heads group queries head_dim"]]:
    """The result of each block of queries."""
    tokens = query.shape[3]
    laid = "rktd"
    if platform() == "cpu":  # where the products for their gradients are faster then
        key, value = (jnp.swapaxes(x, 2, 3) for x in (key, value))
        laid = "rkdt"
    size = max(QUERIES, -(-tokens // BLOCKS))
    done = []
    for start in range(0, tokens, size):
        end = min(start + size, tokens)
        seen = end if causal else tokens
        mask = segments[:, start:end, None] == segments[:, None, :seen]
        mask &= (segments != 0)[:, None, :seen]
        if causal:
            mask &= jnp.arange(seen) <= jnp.arange(start, end)[:, None]
        cut = partial(jax.lax.slice_in_dim, start_index=0, limit_index=seen, axis=laid.index("t"))
        done.append(_attend(query[:, :, :, start:end], cut(key), cut(value), mask, laid))
    return done


def _with_slots(
    query: Float[Array, "rows kv_heads group tokens head_dim"],
    key: Float[Array, "rows kv_heads tokens head_dim"],
    value: Float[Array, "rows kv_heads tokens head_dim"],
    segments: Int[Array, "rows tokens"],
    slots: tuple[int, int],
) -> list[Float[Array, "rows kv_heads group queries head_dim"]]:
    """The results of the prompt, block by block, and of all slots together.

    A block of queries is the same stretch of every slot.
    """
    n, size = slots
    prompt = query.shape[3] - n * size

    def cut(x: Array, axis: int) -> tuple[Array, Array]:
        """The prompt's part, and that of the slots with an axis for them."""
        first, rest = jnp.split(x, [prompt], axis)
        return first, rest.reshape(*rest.shape[:axis], n, size, *rest.shape[axis + 1 :])

    (query, own_query), (segments, own_segments) = cut(query, 3), cut(segments, 1)
    (key, own_key), (value, own_value) = cut(key, 2), cut(value, 2)
    own_query = own_query.swapaxes(2, 3)  # rows kv_heads n group size head_dim
    block = max(-(-QUERIES // n), -(-size // BLOCKS))
    done = []
    for start in range(0, size, block):
        end = min(start + block, size)
        segment = own_segments[:, :, start:end, None]
        prompt_mask = (segment == segments[:, None, None]) & (segments != 0)[:, None, None]
        own = own_segments[:, :, None, :end]
        own_mask = (segment == own) & (own != 0)
        own_mask &= jnp.arange(end) <= jnp.arange(start, end)[:, None]
        done.append(
            _attend_twice(
                own_query[:, :, :, :, start:end],
                (key, value, prompt_mask),
                (own_key[:, :, :, :end], own_value[:, :, :, :end], own_mask),
            )
        )
    out = jnp.concatenate(done, axis=4).swapaxes(2, 3)
    return [
        *_whole_rows(query, key, value, segments, causal=True),
        out.reshape(*out.shape[:3], n * size, -1),
    ]


@partial(jax.checkpoint, prevent_cse=False, static_argnums=4)
def _attend(
    query: Float[Array, "rows kv_heads group queries head_dim"],
    key: Float[Array, "rows kv_heads _ _"],
    value: Float[Array, "rows kv_heads _ _"],
    mask: Bool[Array, "rows queries keys"],
    laid: str,
) -> Float[Array, "rows kv_heads group queries head_dim"]:
    """softmax(query · key) · value; the heads of a group share one matmul.

    Keys and values are `laid` as "rktd" or "rkdt" says: rows, kv_heads, keys and head_dim.
    """
    *_, group, queries, head_dim = query.shape
    flat = query.reshape(*key.shape[:2], group * queries, head_dim)
    logits = jnp.einsum(f"rkqd,{laid}->rkqt", flat, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(*query.shape[:-1], -1)
    logits = jnp.where(mask[:, None, None], logits, MASKED)
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum(
        f"rkqt,{laid}->rkqd",
        weights.reshape(*flat.shape[:-1], -1).astype(value.dtype),
        value,
        preferred_element_type=jnp.float32,
    )
    return (out.reshape(query.shape) / total).astype(value.dtype)


@partial(jax.checkpoint, prevent_cse=False)
def _attend_twice(
    query: Float[Array, "rows kv_heads n group queries head_dim"],
    prompt: tuple[Array, Array, Array],
    own: tuple[Array, Array, Array],
) -> Float[Array, "rows kv_heads n group queries head_dim"]:
    """`_attend` of n slots, with one softmax over the prompt's keys and the slot's own.

    Keys, values and mask of the `prompt` are [rows, kv_heads, keys, head_dim] and
    [rows, n, queries, keys], those of the slots have an axis n behind kv_heads. The prompt's keys
    are multiplied with the queries of all slots at once and never copied.
    """
    *shape, head_dim = query.shape
    flat = query.reshape(*shape[:2], -1, head_dim)
    per_slot = query.reshape(*shape[:3], -1, head_dim)
    matmul = partial(jnp.matmul, preferred_element_type=jnp.float32)

    def logits(queries: Array, key: Array, mask: Array) -> Array:
        found = matmul(queries, key.swapaxes(-1, -2)).reshape(*shape, -1)
        return jnp.where(mask[:, None, :, None], found, MASKED)

    (key, value, mask), (own_key, own_value, own_mask) = prompt, own
    to_prompt, to_own = logits(flat, key, mask), logits(per_slot, own_key, own_mask)
    top = jnp.maximum(to_prompt.max(-1, keepdims=True), to_own.max(-1, keepdims=True))
    on_prompt, on_own = (jnp.exp(x - jax.lax.stop_gradient(top)) for x in (to_prompt, to_own))
    total = on_prompt.sum(-1, keepdims=True) + on_own.sum(-1, keepdims=True)
    out = matmul(on_prompt.astype(value.dtype).reshape(*flat.shape[:-1], -1), value)
    out = out.reshape(query.shape)
    own_out = matmul(on_own.astype(value.dtype).reshape(*per_slot.shape[:-1], -1), own_value)
    return ((out + own_out.reshape(query.shape)) / total).astype(value.dtype)
