"""Attention on TPUs: JAX's splash kernel, which holds no [tokens, tokens] and skips blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Bool, Float, Int

from vtriune_jax.models.layers import ATTENDED

BLOCK, SMALL_BLOCK = 512, 128
"""Queries, and keys, that are looked at together; the small one in rows shorter than the other."""


@dataclass(frozen=True)
class SlotMask(splash.Mask):
    """Causal, but for the keys of other completion slots: of each block, what may be seen."""

    tokens: int
    prompt: int
    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Queries, keys."""
        return self.tokens, self.tokens

    def __getitem__(self, index: Any) -> Bool[np.ndarray, "queries keys"]:
        """A block, asked for with two slices."""
        query, key = (np.arange(self.tokens)[part] for part in index)
        query, key = query[:, None], key[None]
        same = (query - self.prompt) // self.size == (key - self.prompt) // self.size
        return (key <= query) & ((key < self.prompt) | same)


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

    Blocks that causality or the slots hide are not visited; segments only mask inside of a block.
    Padding sees padding, so that all sums have a term. What the backward pass needs of the result,
    the normaliser too, has the name that `remat` knows.
    """
    _, tokens, heads, head_dim = query.shape
    block = _block(tokens)
    forward = dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), block)
    backward = ("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    more = -tokens % block

    def prepare(x: Array) -> Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, more), (0, 0)])

    run: Any = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([_mask(tokens + more, tokens, causal, slots)] * heads),
        block_sizes=splash.BlockSizes(**forward, **dict.fromkeys(backward, block)),
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
    ids = jnp.pad(segments, [(0, 0), (0, more)])
    out: Any = jax.vmap(run)(
        prepare(query * head_dim**-0.5), prepare(key), prepare(value), splash.SegmentIds(ids, ids)
    )
    return jnp.swapaxes(out[:, :, :tokens], 1, 2)


def visited(tokens: int, *, causal: bool, slots: tuple[int, int] | None) -> tuple[int, int]:
    """Blocks of queries in a row of so many tokens, and pairs of blocks that are multiplied."""
    block = _block(tokens)
    count = -(-tokens // block)
    mask = _mask(count * block, tokens, causal, slots)
    parts = [slice(k * block, (k + 1) * block) for k in range(count)]
    return count, sum(bool(mask[query, key].any()) for query in parts for key in parts)


def _block(tokens: int) -> int:
    return BLOCK if tokens >= BLOCK else SMALL_BLOCK


def _mask(padded: int, tokens: int, causal: bool, slots: tuple[int, int] | None) -> splash.Mask:
    if slots:
        n, size = slots
        return SlotMask(padded, tokens - n * size, size)
    return (splash.CausalMask if causal else splash.FullMask)((padded, padded))
