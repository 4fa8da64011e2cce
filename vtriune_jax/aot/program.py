"""Config → the `update` of its last stage, with shapes in place of arrays."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from vtriune_jax import models, sharding
from vtriune_jax.aot.held import held_bytes
from vtriune_jax.data import digits
from vtriune_jax.data.rows import Needs, Rows, Slots, choose
from vtriune_jax.data.tokenizer import load_processor, write_processor
from vtriune_jax.errors import UserError
from vtriune_jax.models import ModelConfig, lora, weights
from vtriune_jax.models.pretrained import read_config
from vtriune_jax.models.sizes import SIZES
from vtriune_jax.optim import make_optimizer, partition
from vtriune_jax.rl.update import abstract_state, jit_update
from vtriune_jax.stages import Stage, check_rows, plan
from vtriune_jax.tiny import tiny_config
from vtriune_jax.types import Batch, TrainState, Vision

PROMPT = Rows("single", 1, 1, 1)
"""A row for each prompt."""


@dataclass(frozen=True)
class Program:
    """The step, what it is called with, and what its cost depends on."""

    update: jax.stages.Wrapped
    state: TrainState
    batch: Batch
    model: ModelConfig
    trained: frozenset[str]
    """Paths of the parameters that are trained."""
    held: int
    """Bytes on a device that training holds beside them (`held.held_bytes`)."""


def build(config: Any, mesh: Mesh) -> Program:
    """The update of the last stage of `config.stages` on the mesh.

    The model's sizes come from its folder or, where there is none, from its name. UserError where
    neither tells them, or the rows of any stage do not divide over the mesh.
    """
    check_rows(config, mesh)
    model = model_config(config)
    stage = plan(config, model.banned_ids)[-1]
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
    vision_frozen = "visual" not in trained
    completions = stage.prompts * max(1, stage.samples) // stage.minibatches
    shape = rows_of(config.batch, stage, model, vision_frozen, sharding.row_shards(mesh))
    count = completions // shape.n
    batch = abstract_batch(config.batch, model, count, shape, vision_frozen=vision_frozen)
    logps = {"old_logps": stage.loss.old == "recomputed", "reference_logps": stage.loss.kl_weight}
    batch = replace(batch, **{name: batch.mask for name, needed in logps.items() if needed})
    reference = params if stage.loss.kl_weight and not model.lora else None
    ahead = config.rollout.ahead if samples_here(config, stage) else 0
    held = held_bytes(stage, config.batch.layout, ahead, reference, batch, mesh)
    return Program(update, state, batch, model, frozenset(weights.flatten(trained)), held)


def samples_here(config: Any, stage: Stage) -> bool:
    """Whether the trainer's devices draw completions, for which they encode images."""
    return stage.sampling is not None and config.rollout.engine == "local"


def model_config(config: Any) -> ModelConfig:
    """The sizes of the config's model, and how it computes."""
    keys = config.model
    how = {key: keys[key] for key in ("dtype", "remat", "unroll", "attention")}
    return replace(_sizes(keys), **how, lora=lora.from_keys(keys.lora))


def rows_of(keys: Any, stage: Stage, model: ModelConfig, vision_frozen: bool, shards: int) -> Rows:
    """The rows that training takes where prompts and completions fill their slots.

    They have the most tokens: shorter completions go into shorter slots, or are packed.
    """
    return choose(
        keys.layout,
        Needs(longest=keys.completion_tokens, together=1),
        Slots(keys.prompt_tokens, keys.completion_tokens, keys.windows, pad_id=0),
        groups=stage.prompts // stage.minibatches,
        samples=max(1, stage.samples),
        unit=keys.micro_batches * shards,
        model=model,
        vision_trained=not vision_frozen,
    )


def abstract_batch(
    keys: Any, model: ModelConfig, count: int, rows: Rows, *, vision_frozen: bool
) -> Batch:
    """The shapes of what `data.packing.pack` makes of `count` rows; `keys`: config.batch."""
    vision = model.vision
    tokens, completions = (count, rows.tokens), (count, rows.n, rows.completion_tokens)
    packed = rows.kind == "packed"
    images_shape = (count, rows.n if packed else 1, keys.windows)
    patches = (*images_shape, vision.slots)

    def ints(*shape: int, dtype: str = "int32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    def floats(*shape: int, dtype: str = "float32") -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    images: dict[str, Any] = {
        "vision": Vision(
            ints(*patches, vision.patch, dtype="uint8"), ints(*patches, 2), ints(*patches)
        )
    }
    if vision_frozen:
        units = keys.windows * vision.slots // vision.unit_patches
        shape = (*images_shape[:2], units, vision.out)
        images = {"features": floats(*shape, dtype=model.dtype)}
    return Batch(
        ids=ints(*tokens),
        positions=ints(count, 3, rows.tokens),
        segments=ints(*tokens),
        image_index=ints(*tokens),
        mask=floats(*completions),
        advantages=floats(*completions),
        rollout_logps=floats(*completions),
        source=ints(*completions[:2]),
        predictors=ints(*completions) if packed else None,
        **images,
    )


def abstract_images(keys: Any, model: ModelConfig, prompts: int) -> Vision:
    """The shapes of what the vision tower is given for so many prompts; `keys`: config.batch."""
    of_rows = abstract_batch(keys, model, prompts, PROMPT, vision_frozen=False).vision
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((x.shape[0], *x.shape[2:]), x.dtype), of_rows
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
