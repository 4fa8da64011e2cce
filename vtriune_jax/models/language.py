"""The language model: GQA with M-RoPE, SwiGLU, RMS norm; one scanned stack of layers.

Three ways through the same layers: a call (training, scoring), `prefill` (the prompt, before
sampling) and `decode` (one more token for each completion of each prompt).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vtriune_jax.models.attention import KV, attention, decode_attention
from vtriune_jax.models.config import ModelConfig, TextConfig
from vtriune_jax.models.layers import (
    Linear,
    RMSNorm,
    SwiGLU,
    Turns,
    frequencies,
    on_rows,
    rotate,
    stack,
    through,
    turns,
    unstack,
    whole,
)
from vtriune_jax.models.lora import adapt, fold


def mrope_angles(
    positions: Int[Array, "rows 3 tokens"], config: TextConfig
) -> Float[Array, "rows tokens half"]:
    """Rotary angles; each frequency turns with time, height or width by its section."""
    axis = np.repeat(np.arange(3), config.mrope_section)
    return jnp.moveaxis(positions[:, axis], 1, 2) * frequencies(config.head_dim, config.rope_theta)


class SelfAttention(nnx.Module):
    """The four maps around grouped-query attention; q, k and v have biases."""

    def __init__(self, config: TextConfig):
        self.head_dim = config.head_dim
        width, kv_width = config.embed, config.kv_heads * config.head_dim
        self.q = Linear(width, width, bias=True)
        self.k = Linear(width, kv_width, bias=True)
        self.v = Linear(width, kv_width, bias=True)
        self.o = Linear(width, width, bias=False)

    def qkv(self, x: Float[Array, "*rows tokens embed"], by: Turns) -> tuple[Array, Array, Array]:
        """Queries, keys and values, each `[*rows, tokens, its heads, head_dim]`, rotated."""
        query, key, value = (
            linear(x).reshape(*x.shape[:-1], -1, self.head_dim)
            for linear in (self.q, self.k, self.v)
        )
        return rotate(query, by), rotate(key, by), value


class Layer(nnx.Module):
    """Pre-norm attention and SwiGLU."""

    def __init__(self, config: TextConfig):
        self.attn_norm = RMSNorm(config.embed, config.norm_eps)
        self.attn = SelfAttention(config)
        self.mlp_norm = RMSNorm(config.embed, config.norm_eps)
        self.mlp = SwiGLU(config.embed, config.mlp, bias=False)

    def finish(
        self, x: Float[Array, "*rows embed"], attended: Float[Array, "*rows heads head_dim"]
    ) -> Float[Array, "*rows embed"]:
        """What follows the attention: output map, residuals, MLP."""
        x = x + self.attn.o(attended.reshape(x.shape))
        return on_rows(x + self.mlp(self.mlp_norm(x)))


class Embedding(nnx.Module):
    """The table of token embeddings."""

    def __init__(self, vocab: int, width: int):
        self.embedding = nnx.Param(jnp.zeros((vocab, width)))

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows width"]:
        """Look the ids up."""
        return self.embedding[...][ids]


class LanguageModel(nnx.Module):
    """Embedded tokens → hidden states."""

    def __init__(self, config: ModelConfig):
        text = config.text
        self.config = text
        self.dtype, self.attention = config.dtype, config.attention
        self.remat, self.unroll = config.remat, config.unroll
        self.embed = Embedding(text.vocab, text.embed)
        self.layers = stack(adapt(Layer(text), config.lora), text.layers)
        self.norm = RMSNorm(text.embed, text.norm_eps)
        self.head = None if config.tied else Linear(text.embed, text.vocab, bias=False)

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        positions: Int[Array, "rows 3 tokens"],
        segments: Int[Array, "rows tokens"],
        slots: tuple[int, int] | None = None,
    ) -> Float[Array, "rows tokens embed"]:
        """Run all layers and the final norm; `slots` as in `attention`."""
        return self._run(x, positions, segments, lambda key, value: None, slots)[0]

    def prefill(
        self,
        x: Float[Array, "rows tokens embed"],
        positions: Int[Array, "rows 3 tokens"],
        segments: Int[Array, "rows tokens"],
    ) -> tuple[Float[Array, "rows tokens embed"], tuple[KV, ...]]:
        """The same, keeping the keys and values of each layer, at which `decode` looks."""

        def keep(key: Array, value: Array) -> KV:
            return KV(jnp.moveaxis(key, 1, 3), jnp.swapaxes(value, 1, 2))

        x, kept = self._run(x, positions, segments, keep)
        return x, _each(kept, self.config.layers)

    def apart(self) -> tuple[Layer, ...]:
        """The layers one by one, with parameters of the type of the activations, for `decode`.

        Adapters have gone into the matrices. This is a copy, whole on each device (`layers.whole`):
        worth it where they are looked at for each of many tokens.
        """
        stacked, build = unstack(self.layers)

        def ready(params: Any) -> Layer:
            graphdef, params = nnx.split(fold(build(params)))
            return nnx.merge(graphdef, jax.tree.map(lambda p: whole(p.astype(self.dtype)), params))

        return tuple(map(ready, _each(stacked, self.config.layers)))

    def _run(
        self,
        x: Array,
        positions: Array,
        segments: Array,
        keep: Callable[[Array, Array], Any],
        slots: tuple[int, int] | None = None,
    ) -> tuple[Array, Any]:
        by = turns(mrope_angles(positions, self.config))
        stacked, build = unstack(self.layers)

        def layer(x: Array, params: Any) -> tuple[Array, Any]:
            this: Layer = build(params)
            query, key, value = this.attn.qkv(this.attn_norm(x), by)
            attended = attention(
                query, key, value, segments, causal=True, slots=slots, kernel=self.attention
            )
            return this.finish(x, attended), keep(key, value)

        x, kept = through(layer, x, stacked, remat=self.remat, unroll=self.unroll)
        return self.norm(x), kept

    def decode(
        self,
        layers: Sequence[Layer],
        x: Float[Array, "groups n embed"],
        positions: Int[Array, "groups n"],
        prompt: Sequence[KV],
        prompt_segments: Int[Array, "groups tokens"],
        own: Sequence[KV],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "groups n embed"], tuple[KV, ...]]:
        """Run one new token of each completion, storing its keys and values at `index` of `own`."""
        by = turns(positions[..., None] * frequencies(self.config.head_dim, self.config.rope_theta))
        stored = []
        # Not a scan: it would copy each layer's parameters, keys and values on every step.
        for layer, prompt_kv, kv in zip(layers, prompt, own, strict=True):
            query, key, value = layer.attn.qkv(layer.attn_norm(x), by)
            attended = decode_attention(query, key, value, prompt_kv, prompt_segments, kv, index)
            # The sum makes XLA write after it has read; its CPU backend would write into copies.
            key, value = (new + 0 * attended[:, :, :1] for new in (key, value))
            kv = KV(
                _write(kv.keys, key.swapaxes(1, 2)[..., None], index, axis=-1),
                _write(kv.values, value.swapaxes(1, 2)[..., None, :], index, axis=-2),
            )
            x = layer.finish(x, attended)
            stored.append(kv)
        return self.norm(x), tuple(stored)


def _write(cache: Array, new: Array, index: Array, axis: int) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(cache, new, index, axis % cache.ndim)


def _each(stacked: Any, layers: int) -> tuple[Any, ...]:
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(layers))
