"""The jitted doors: image features of a batch, logits of what a Hugging Face processor returns."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vtriune_jax.errors import UserError
from vtriune_jax.models import layout
from vtriune_jax.models.core import merge, split
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL
from vtriune_jax.types import Vision


@partial(jax.jit, static_argnums=0)
def encode(
    graphdef: nnx.GraphDef, params: Mapping[str, Any], vision: Vision
) -> Float[Array, "rows units embed"]:
    """Image features of stacked visions (`layout.stack_visions`), once per prompt."""
    return merge(graphdef, params).encode(vision)


def forward(model: Qwen2_5_VL, inputs: Mapping[str, Any]) -> Float[Array, "batch tokens vocab"]:
    """Logits of what a Hugging Face processor returns.

    `inputs` holds `input_ids` and, where needed, `attention_mask` (padding on either side),
    `pixel_values` and `image_grid_thw`; logits in the padding mean nothing. Raises UserError when
    image tokens and images do not match.
    """
    config = model.config
    ids = np.asarray(inputs["input_ids"], np.int32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)), bool)
    grids = np.asarray(inputs.get("image_grid_thw", ()), np.int64).reshape(-1, 3)
    patches = np.asarray(inputs.get("pixel_values", ()), np.float32)
    patches = patches.reshape(-1, config.vision.patch)
    units = grids.prod(axis=1) // config.vision.unit_patches
    image_tokens = ((ids == config.image_token_id) & mask).sum(axis=1)
    # The images of the whole batch come in one sequence: a row owns as many as its tokens cover.
    ends = np.searchsorted(np.cumsum(units), np.cumsum(image_tokens), side="left")
    ends = np.where(image_tokens.cumsum() > 0, ends + 1, 0)
    if image_tokens.sum() != units.sum():
        raise UserError(
            f"{image_tokens.sum()} image tokens but {units.sum()} image features; pass input_ids "
            "and image_grid_thw from the same processor call"
        )
    positions = np.zeros((len(ids), 3, ids.shape[1]), np.int32)
    index = np.full(ids.shape, -1, np.int32)
    visions, first_patch = [], 0
    for row, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        count = int(grids[start:end].prod(axis=1).sum())
        vision, unit_index = layout.pack_vision(
            patches[first_patch : first_patch + count], grids[start:end], config
        )
        first_patch += count
        visions.append(vision)
        row_ids = ids[row, mask[row]]
        positions[row][:, mask[row]] = layout.mrope_positions(row_ids, grids[start:end], config)
        index[row, mask[row]] = layout.image_index(row_ids, unit_index, config)
    windows = max(len(vision.segments) for vision in visions)
    graphdef, params = split(model)
    vision = layout.stack_visions(visions, windows)
    return _logits(graphdef, params, ids, positions, mask.astype(np.int32), vision, index)


@partial(jax.jit, static_argnums=0)
def _logits(
    graphdef: nnx.GraphDef,
    params: Mapping[str, Any],
    ids: Array,
    positions: Array,
    segments: Array,
    vision: Vision,
    image_index: Array,
) -> Array:
    model = merge(graphdef, params)
    hidden = model(ids, positions, segments, model.encode(vision), image_index)
    return jnp.matmul(hidden, model.head().astype(hidden.dtype), preferred_element_type=jnp.float32)
