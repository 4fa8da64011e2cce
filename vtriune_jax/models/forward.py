"""The jitted doors: image features of a batch, logits of what a Hugging Face processor returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from vtriune_jax.errors import UserError
from vtriune_jax.models import layout
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.models.core import merge, split
from vtriune_jax.models.pieces import map_rows
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL
from vtriune_jax.models.vision import normalise
from vtriune_jax.types import Vision


@partial(jax.jit, static_argnums=(0, 3))
def encode(
    graphdef: nnx.GraphDef, params: Mapping[str, Any], vision: Vision, pieces: int = 1
) -> Float[Array, "rows units embed"]:
    """Image features of stacked visions (`layout.stack_visions`), once per prompt.

    The rows, a multiple of `pieces`, go through the tower piece by piece, to save memory.
    """
    return map_rows(merge(graphdef, params).encode, vision, pieces)


def forward(model: Qwen2_5_VL, inputs: Mapping[str, Any]) -> Float[Array, "batch tokens vocab"]:
    """Logits of what a Hugging Face processor returns.

    `inputs` holds `input_ids` and, where needed, `attention_mask` (padding on either side),
    `pixel_values` and `image_grid_thw`, `pixel_values_videos`, `video_grid_thw` and
    `second_per_grid_ts` (None is like absent); logits in the padding mean nothing. Pixels may also
    be what `data.images` returns. Raises UserError when image or video tokens do not match images
    or videos.
    """
    config = model.config
    inputs = {name: value for name, value in inputs.items() if value is not None}
    ids = np.asarray(inputs["input_ids"], np.int32)
    mask = np.asarray(inputs.get("attention_mask", np.ones_like(ids)), bool)
    media = {
        config.image_token_id: _media(inputs, "image", ids[mask], config),
        config.video_token_id: _media(inputs, "video", ids[mask], config),
    }
    positions = np.zeros((len(ids), 3, ids.shape[1]), np.int32)
    index = np.full(ids.shape, -1, np.int32)
    visions = []
    for row in range(len(ids)):
        row_ids = ids[row, mask[row]]
        own = _next_media(row_ids, media, config)
        grids = np.array([one.grid for one in own], np.int64).reshape(-1, 3)
        seconds = [one.seconds for one in own if one.seconds is not None]
        positions[row][:, mask[row]] = layout.mrope_positions(row_ids, grids, config, seconds)
        no_patches = np.zeros((0, config.vision.patch), np.float32)
        patches = np.concatenate([no_patches, *(one.patches for one in own)])
        vision, unit_index = layout.pack_vision(patches, grids, config)
        visions.append(vision)
        index[row, mask[row]] = layout.image_index(row_ids, unit_index, config)
    windows = max(len(vision.segments) for vision in visions)
    graphdef, params = split(model)
    vision = layout.stack_visions(visions, windows)
    return _logits(graphdef, params, ids, positions, mask.astype(np.int32), vision, index)


class _Medium(NamedTuple):
    """An image, or a video with the seconds that one of its frames lasts."""

    grid: Int[np.ndarray, "3"]
    patches: Float[np.ndarray, "patches patch"]
    seconds: float | None


def _media(
    inputs: Mapping[str, Any], kind: str, ids: Int[np.ndarray, " tokens"], config: ModelConfig
) -> deque[_Medium]:
    """All images or videos of a batch, which come in one sequence."""
    video = kind == "video"
    grids = np.asarray(inputs.get(f"{kind}_grid_thw", ()), np.int64).reshape(-1, 3)
    patches = np.asarray(inputs.get("pixel_values_videos" if video else "pixel_values", ()))
    patches = normalise(patches).astype(np.float32).reshape(-1, config.vision.patch)
    tokens = (ids == (config.video_token_id if video else config.image_token_id)).sum()
    units = grids.prod(axis=1).sum() // config.vision.unit_patches
    if tokens != units:
        raise UserError(
            f"{tokens} {kind} tokens but {units} {kind} features; pass input_ids and "
            f"{kind}_grid_thw from the same processor call"
        )
    pieces = np.split(patches, np.cumsum(grids.prod(axis=1))[:-1])[: len(grids)]
    seconds: Any = [None] * len(grids)
    if video:
        seconds = np.asarray(inputs.get("second_per_grid_ts", [1.0] * len(grids)))
    if len(seconds) != len(grids):
        raise UserError(
            f"second_per_grid_ts has {len(seconds)} entries for {len(grids)} videos; "
            "pass one per video"
        )
    return deque(map(_Medium, grids, pieces, seconds))


def _next_media(
    ids: Int[np.ndarray, " tokens"], media: Mapping[int, deque[_Medium]], config: ModelConfig
) -> list[_Medium]:
    """Take the images and videos that the tokens of one row stand for, in the row's order."""
    tokens = ids[np.isin(ids, list(media))]
    own = []
    while len(tokens):
        if not media[int(tokens[0])]:
            raise UserError(
                "the tokens of an image or video are not all in one run of one row; pass input_ids "
                "as the processor returns them"
            )
        own.append(media[int(tokens[0])].popleft())
        tokens = tokens[own[-1].grid.prod() // config.vision.unit_patches :]
    return own


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
