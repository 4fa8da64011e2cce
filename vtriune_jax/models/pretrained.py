"""Checkpoint folders in the Hugging Face layout: read a model, write a model."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors import SafetensorError

from vtriune_jax.errors import UserError
from vtriune_jax.models import weights
from vtriune_jax.models.config import ModelConfig
from vtriune_jax.models.core import abstract, merge, split
from vtriune_jax.models.qwen2_5_vl import Qwen2_5_VL

MAX_SHARD_BYTES = 4 * 1024**3


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
