"""The model and its doors: make, load, save, take apart, put together, run.

    graphdef, params = split(load_pretrained(path))
    hidden = merge(graphdef, params)(ids, positions, segments)      # inside jit

`params` is a nested dict of arrays; a parameter's path (`language/layers/mlp/gate/kernel`) is its
one name everywhere: sharding, optimizer groups, file keys and metrics go by it.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors import SafetensorError

from vtriune_jax.errors import UserError
from vtriune_jax.models import layout, weights
from vtriune_jax.models.config import ModelConfig, TextConfig, VisionConfig
from vtriune_jax.models.language import KV
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL
from vtriune_jax.types import Vision

__all__ = [
    "KV",
    "ModelConfig",
    "Qwen2_5_VL",
    "TextConfig",
    "VisionConfig",
    "abstract",
    "encode",
    "forward",
    "init",
    "load_pretrained",
    "merge",
    "save_pretrained",
    "split",
]

MAX_SHARD_BYTES = 4 * 1024**3


def split(model: Qwen2_5_VL) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Take the model apart into its structure (hashable) and a nested dict of parameters."""
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge(graphdef: nnx.GraphDef, params: Mapping[str, Any]) -> Qwen2_5_VL:
    """Put structure and parameters together again; cheap, meant for use inside jit."""
    return nnx.merge(graphdef, params)


def abstract(config: ModelConfig) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """What `split` would give for a model of this config, with shapes in place of arrays."""
    return split(nnx.eval_shape(lambda: Qwen2_5_VL(config)))


def init(config: ModelConfig, seed: int) -> Qwen2_5_VL:
    """A new model: normal(0, 1/√width) matrices and embeddings, zero biases, unit norms.

    At the real widths that is about Hugging Face's 0.02; narrow models do not start to learn from
    0.02, as every map would shrink its input several times. Drawn on the host: nothing to compile,
    and the same numbers on every device.
    """
    graphdef, shapes = abstract(config)
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        name = path.rsplit("/", 1)[1]
        if name in ("scale", "bias"):
            return np.full(shape, name == "scale", np.float32)
        width = shape[-1] if name == "embedding" else shape[-2]
        return width**-0.5 * rng.standard_normal(shape, np.float32)

    params = {path: draw(path, leaf.shape) for path, leaf in weights.flatten(shapes).items()}
    return merge(graphdef, jax.tree.map(jnp.asarray, weights.unflatten(params)))


def load_pretrained(path: str | Path, *, dtype: str = "float32", remat: str = "none") -> Qwen2_5_VL:
    """Read a Hugging Face checkpoint folder (layouts: see `weights`) as float32 parameters.

    Raises UserError naming the file and key that is missing, broken, left over or mis-shaped.
    """
    folder = Path(path)
    file = folder / "config.json"
    try:
        hf = json.loads(file.read_text())
    except OSError as error:
        raise UserError(f"cannot read {file} ({error.strerror}); expected a checkpoint") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not JSON ({error}); copy it again") from None
    config = ModelConfig.from_hf(hf, dtype=dtype, remat=remat)
    graphdef, shapes = abstract(config)
    wanted = {path: leaf.shape for path, leaf in weights.flatten(shapes).items()}
    params = weights.unflatten(weights.read(folder, wanted))
    return merge(graphdef, jax.tree.map(jnp.asarray, params))


def save_pretrained(
    model: Qwen2_5_VL, path: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write config.json and float32 safetensors in the hub's layout.

    Each file is replaced atomically, config.json last; other files of the folder (tokenizer,
    processor) stay. Raises UserError when the folder cannot be written.
    """
    folder, vision = Path(path), model.config.vision
    patch_shape = (
        vision.channels,
        vision.temporal_patch_size,
        vision.patch_size,
        vision.patch_size,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
            new = Path(temporary)
            flat = weights.flatten(split(model)[1])
            names = weights.write(new, flat, patch_shape, max_shard_bytes)
            config = json.dumps(model.config.to_hf_dict(), indent=2)
            (new / "config.json").write_text(config + "\n")
            for name in (*names, "config.json"):
                os.replace(new / name, folder / name)
        for file in [*folder.glob(weights.SHARDS), folder / weights.SINGLE, folder / weights.INDEX]:
            if file.name not in names:
                file.unlink(missing_ok=True)  # of an earlier save in other shards
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot write the checkpoint {folder} ({reason}); free space or choose another folder"
        ) from None


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
