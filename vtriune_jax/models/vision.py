"""The vision tower: windowed attention, a few full-attention layers, a merger of 2×2 patches.

Everything stays in window order from the first layer to the last: a windowed layer is a batched
matmul over `[rows · windows, slots]`, a full layer looks over all the slots of a row that belong to
the same image frame. Nothing is un-permuted; image tokens point at their unit (see `layout`).
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vtriune_jax.models.attention import attention
from vtriune_jax.models.config import PIXEL_MEAN, PIXEL_STD, VisionConfig
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
)
from vtriune_jax.types import Vision

NORM_EPS = 1e-6


def normalise(patches: Any) -> Any:
    """(pixel / 255 - mean) / std of bytes [*rows, patch], channel by channel, in float32.

    Of NumPy or JAX, as the result is; floats stay as they are, normalised already.
    """
    if patches.dtype != np.uint8:
        return patches
    mean, std = (
        np.repeat(values, patches.shape[-1] // len(values)) for values in (PIXEL_MEAN, PIXEL_STD)
    )
    return patches * np.float32(1 / (255 * std)) - np.float32(mean / std)


def attention_runs(config: VisionConfig) -> tuple[int, tuple[tuple[bool, int], ...]]:
    """How often the pattern of layers repeats, and its runs of (full attention?, layers).

    The real tower is 4 × (7 windowed, 1 full): one compiled body of two runs. A pattern without a
    period is one repeat.
    """
    full = [layer in config.full_attention for layer in range(config.depth)]
    period = next(
        p
        for p in range(1, config.depth + 1)
        if config.depth % p == 0 and full == full[:p] * (config.depth // p)
    )
    runs = tuple((kind, len(list(run))) for kind, run in groupby(full[:period]))
    return config.depth // period, runs


def vision_angles(
    positions: Int[Array, "*rows 2"], config: VisionConfig
) -> Float[Array, "*rows half"]:
    """Rotary angles: the first half of the pairs turns with the row, the second with the column."""
    angles = positions[..., None] * frequencies(config.head_dim // 2, config.rope_theta)
    return angles.reshape(*positions.shape[:-1], -1)


class VisionAttention(nnx.Module):
    """Multi-head attention without causality, inside equal segments."""

    def __init__(self, config: VisionConfig, kernel: str):
        self.heads, self.kernel = config.heads, kernel
        self.qkv = Linear(config.embed, 3 * config.embed, bias=True)
        self.proj = Linear(config.embed, config.embed, bias=True)

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        by: Turns,
        segments: Int[Array, "rows tokens"],
    ) -> Float[Array, "rows tokens embed"]:
        """Attend inside each row."""
        rows, tokens, embed = x.shape
        qkv = self.qkv(x).reshape(rows, tokens, 3, self.heads, -1)
        query, key, value = (qkv[:, :, i] for i in range(3))
        query, key = rotate(query, by), rotate(key, by)
        out = attention(query, key, value, segments, causal=False, kernel=self.kernel)
        return self.proj(out.reshape(rows, tokens, embed))


class VisionBlock(nnx.Module):
    """Pre-norm attention and SwiGLU; what counts as a row (window or image row) is the caller's."""

    def __init__(self, config: VisionConfig, kernel: str):
        self.norm1 = RMSNorm(config.embed, NORM_EPS)
        self.attn = VisionAttention(config, kernel)
        self.norm2 = RMSNorm(config.embed, NORM_EPS)
        self.mlp = SwiGLU(config.embed, config.mlp, bias=True)

    def __call__(
        self,
        x: Float[Array, "rows tokens embed"],
        by: Turns,
        segments: Int[Array, "rows tokens"],
    ) -> Float[Array, "rows tokens embed"]:
        """One layer."""
        x = x + self.attn(self.norm1(x), by, segments)
        return on_rows(x + self.mlp(self.norm2(x)))


class Merger(nnx.Module):
    """Joins the patches of a unit and maps them to the width of the language model."""

    def __init__(self, config: VisionConfig):
        self.width = config.embed * config.unit_patches
        self.norm = RMSNorm(config.embed, NORM_EPS)
        self.hidden = Linear(self.width, self.width, bias=True)
        self.out = Linear(self.width, config.out, bias=True)

    def __call__(self, x: Float[Array, "rows patches embed"]) -> Float[Array, "rows units out"]:
        """Merge neighbouring patches."""
        x = self.norm(x).reshape(x.shape[0], -1, self.width)
        return on_rows(self.out(jax.nn.gelu(self.hidden(x), approximate=False)))


class VisionTower(nnx.Module):
    """Patches in windows → one feature per unit, in the same order."""

    def __init__(self, config: VisionConfig, *, dtype: str, remat: str, unroll: bool, kernel: str):
        self.config, self.dtype = config, dtype
        self.remat, self.unroll = remat, unroll
        self.patch_embed = Linear(config.patch, config.embed, bias=False)
        self.blocks = stack(VisionBlock(config, kernel), config.depth)
        self.merger = Merger(config)

    def __call__(self, vision: Vision) -> Float[Array, "rows units out"]:
        """Encode the images of some rows, each with the same number of windows."""
        rows, windows, slots = vision.segments.shape
        if windows == 0:
            return jnp.zeros((rows, 0, self.config.out), self.dtype)
        x = self.patch_embed(normalise(jnp.asarray(vision.patches)).astype(self.dtype))
        by = turns(vision_angles(jnp.asarray(vision.positions), self.config))
        segments = jnp.asarray(vision.segments)
        repeats, runs = attention_runs(self.config)
        stacked, build = unstack(self.blocks)
        stacked = jax.tree.map(lambda p: p.reshape(repeats, -1, *p.shape[1:]), stacked)

        def run_layers(x: Array, layers: Any, full: bool) -> Array:
            """One run of layers of the same kind; full layers take a whole row as one window."""
            tokens = windows * slots if full else slots
            here = jax.tree.map(lambda a: a.reshape(-1, tokens, *a.shape[3:]), (by, segments))

            def layer(x: Array, params: Any) -> tuple[Array, None]:
                return build(params)(x, *here), None

            flat = x.reshape(-1, tokens, x.shape[-1])
            y, _ = through(layer, flat, layers, remat=self.remat, unroll=self.unroll)
            return y.reshape(x.shape)

        def one_repeat(x: Array, layers: Any) -> tuple[Array, None]:
            start = 0
            for full, length in runs:
                run = jax.tree.map(lambda p: p[start : start + length], layers)  # noqa: B023
                x, start = run_layers(x, run, full), start + length
            return x, None

        x, _ = jax.lax.scan(one_repeat, x, stacked, unroll=self.unroll)
        return self.merger(x.reshape(rows, windows * slots, -1))
