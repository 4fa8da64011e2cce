"""Qwen2.5-VL: vision tower, language model, and the gather that joins them."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from vtriune_jax.models.attention import KV
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.models.language import LanguageModel, Layer
from vtriune_jax.models.vision import VisionTower
from vtriune_jax.types import Vision


class Qwen2_5_VL(nnx.Module):
    """Qwen2.5-VL of any size.

    Parameters are float32, stacked over layers; activations have `config.dtype`.
    """

    def __init__(self, config: ModelConfig):
        self.config = config
        self.visual = VisionTower(
            config.vision,
            dtype=config.dtype,
            remat=config.remat,
            unroll=config.unroll,
            kernel=config.attention,
        )
        self.language = LanguageModel(config)

    def encode(self, vision: Vision) -> Float[Array, "rows units embed"]:
        """Image features, in window order; padding slots give meaningless, finite numbers."""
        return self.visual(vision)

    def __call__(
        self,
        ids: Int[Array, "rows tokens"],
        positions: Int[Array, "rows 3 tokens"],
        segments: Int[Array, "rows tokens"],
        features: Float[Array, "rows units embed"] | None = None,
        image_index: Int[Array, "rows tokens"] | None = None,
        *,
        slots: tuple[int, int] | None = None,
    ) -> Float[Array, "rows tokens embed"]:
        """Hidden states after the final norm.

        A token sees earlier tokens of its own segment; segment 0 is padding. Where `image_index` is
        not -1, the token is that unit of `features` in place of its embedding. With `slots` =
        (n, size) a row ends in n completions that do not see each other (`attention`).
        """
        x = self._embed(ids, features, image_index)
        return self.language(x, positions, segments, slots)

    def prefill(
        self,
        ids: Int[Array, "rows tokens"],
        positions: Int[Array, "rows 3 tokens"],
        segments: Int[Array, "rows tokens"],
        features: Float[Array, "rows units embed"] | None = None,
        image_index: Int[Array, "rows tokens"] | None = None,
    ) -> tuple[Float[Array, "rows tokens embed"], tuple[KV, ...]]:
        """Like a call, and each layer's keys and values, of `rows` = [rows, kv_heads]."""
        x = self._embed(ids, features, image_index)
        return self.language.prefill(x, positions, segments)

    def decode(
        self,
        layers: Sequence[Layer],
        ids: Int[Array, "groups n"],
        positions: Int[Array, "groups n"],
        prompt: Sequence[KV],
        prompt_segments: Int[Array, "groups tokens"],
        own: Sequence[KV],
        index: Int[Array, ""],
    ) -> tuple[Float[Array, "groups n embed"], tuple[KV, ...]]:
        """One more token for n completions of each prompt.

        `layers` are `language.apart()`, `prompt` is what `prefill` kept, and `own` holds the
        completions' own keys and values, of `rows` = [groups, kv_heads, n], for each layer;
        `index` says how many are there already, and is where this token's are written.
        Completions are text, so one position each.
        """
        x = self.language.embed(ids).astype(self.config.dtype)
        return self.language.decode(layers, x, positions, prompt, prompt_segments, own, index)

    def head(self) -> Float[Array, "embed vocab"]:
        """The matrix that turns hidden states into logits."""
        if self.language.head is None:
            return self.language.embed.embedding[...].T
        return self.language.head.kernel[...]

    def _embed(
        self, ids: Array, features: Array | None, image_index: Array | None
    ) -> Float[Array, "rows tokens embed"]:
        x = self.language.embed(ids).astype(self.config.dtype)
        if features is None or image_index is None or features.shape[1] == 0:
            return x
        place = jnp.maximum(image_index, 0)[..., None]
        taken = jnp.take_along_axis(features.astype(x.dtype), place, axis=1)
        return jnp.where(image_index[..., None] >= 0, taken, x)
