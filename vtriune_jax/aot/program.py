"""Config → the `update` of its last stage, with shapes in place of arrays."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vtriune_jax import models, sharding
from vtriune_jax.data import digits
from vtriune_jax.data.tokenizer import load_processor, write_processor
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, lora, weights
from vtriune_jax.models.pretrained import read_config
from vtriune_jax.models.sizes import SIZES
from vtriune_jax.optim import make_optimizer, partition
from vtriune_jax.rl.update import abstract_state, jit_update
from vtriune_jax.stages import plan
from vtriune_jax.tiny import tiny_config
from vtriune_jax.types import Batch, TrainState, Vision


@dataclass(frozen=True)
class Program:
    """The step, what it is called with, and what its cost depends on."""

    update: jax.stages.Wrapped
    state: TrainState
    batch: Batch
    model: ModelConfig
    trained: frozenset[str]
    """Paths of the parameters that are trained."""


def build(config: Any, mesh: Mesh) -> Program:
    """The update of the last stage of `config.stages` on the mesh.

    The model's sizes come from its folder or, where there is none, from its name. UserError where
    neither tells them, or the rows of the batch do not divide over the mesh.
    """
    model = model_config(config)
    stage = plan(config, model.banned_ids)[-1]
    rows = stage.prompts * max(1, stage.samples) // stage.minibatches
    sharding.check_rows(rows, mesh, config.batch.micro_batches)
    graphdef, params = models.abstract(model)
    if model.lora and config.model.lora.base_dtype != "float32":
        params = _with_base_dtype(params, config.model.lora.base_dtype)
    tx = make_optimizer(stage.optim)
    state = abstract_state(params, tx, stage.freeze)
    trained, _ = partition(params, stage.freeze)
    update = jit_update(
        graphdef,
        tx,
        stage.loss,
        mesh,
        state,
        num_sources=len(config.data.train),
        freeze=stage.freeze,
        micro_batches=config.batch.micro_batches,
    )
    batch = abstract_batch(config.batch, model, rows, vision_frozen="visual" not in trained)
    logps = {"old_logps": stage.loss.old == "recomputed", "reference_logps": stage.loss.kl_weight}
    batch = replace(batch, **{name: batch.mask for name, needed in logps.items() if needed})
    return Program(update, state, batch, model, frozenset(weights.flatten(trained)))


def model_config(config: Any) -> ModelConfig:
    """The sizes of the config's model, and how it computes."""
    found = replace(_sizes(config.model), dtype=config.model.dtype, remat=config.model.remat)
    return replace(found, lora=lora.from_keys(config.model.lora))


def abstract_batch(keys: Any, model: ModelConfig, rows: int, *, vision_frozen: bool) -> Batch:
    """The shapes of what `data.packing.pack` makes of `rows` completions; `keys`: config.batch."""
    vision = model.vision
    tokens, completion = keys.prompt_tokens + keys.completion_tokens, keys.completion_tokens
    patches = (rows, keys.windows, vision.slots)

    def ints(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def floats(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    images: dict[str, Any] = {
        "vision": Vision(floats(*patches, vision.patch), ints(*patches, 2), ints(*patches))
    }
    if vision_frozen:
        units = keys.windows * vision.slots // vision.unit_patches
        images = {"features": floats(rows, units, vision.out, dtype=model.dtype)}
    return Batch(
        ids=ints(rows, tokens),
        positions=ints(rows, 3, tokens),
        segments=ints(rows, tokens),
        image_index=ints(rows, tokens),
        mask=floats(rows, completion),
        advantages=floats(rows, completion),
        rollout_logps=floats(rows, completion),
        source=ints(rows),
        **images,
    )


def _sizes(keys: Any) -> ModelConfig:
    if not keys.path:
        return _tiny(keys.tiny)
    folder = Path(keys.path).expanduser()
    if folder.is_dir():
        return read_config(folder)
    if found := re.search(r"Qwen2\.5-VL-(\d+B)", keys.path, re.IGNORECASE):
        return models.named(found[1].upper())
    raise UserError(
        f"model.path={keys.path} is no folder, nor the name of a published model, "
        f"Qwen2.5-VL-{{{','.join(SIZES)}}}-Instruct; give one of the two"
    )


def _tiny(sizes: Any) -> ModelConfig:
    """The built-in model; its tokenizer is made to know the vocabulary."""
    with tempfile.TemporaryDirectory() as folder:
        write_processor(Path(folder), digits.texts(), vocab_size=sizes.vocab_size)
        return ModelConfig.from_hf(tiny_config(sizes, load_processor(Path(folder)).tokenizer))


def _with_base_dtype(params: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Matrices and all else that is not an adapter in another type, as `load_pretrained` does."""
    flat = weights.flatten(params)
    return weights.unflatten(
        {
            path: leaf if lora.is_adapter(path) else jax.ShapeDtypeStruct(leaf.shape, dtype)
            for path, leaf in flat.items()
        }
    )
