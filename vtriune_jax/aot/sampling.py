"""What the devices run between two updates, compiled as they are: vision tower and sampler."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from vtriune_jax import models, sharding
from vtriune_jax.aot.compiling import attempt, memory_of, needed_bytes
from vtriune_jax.aot.held import param_bytes
from vtriune_jax.aot.program import Program, abstract_batch
from vtriune_jax.data.rows import Rows
from vtriune_jax.rollout import local
from vtriune_jax.stages import plan

PROMPT = Rows("single", 1, 1, 1)
"""A row for each prompt."""


def sampling_bytes(config: Any, program: Program, mesh: Mesh, limit: int) -> dict[str, int]:
    """Bytes on a device while the tower encodes a step's images, and while the sampler draws.

    The optimizer's state, which waits meanwhile, and the images' features are included; above
    `limit` if it does not fit. Nothing where the last stage does not sample, or servers do.
    """
    if config.stages[-1] != "grpo" or config.rollout.engine != "local":
        return {}
    params = param_bytes(program.state.params, mesh)
    waiting = param_bytes(program.state, mesh) - params
    found = {}
    for name, lowered, beside in _programs(config, program, mesh):
        compiled, trouble = attempt(lowered)
        if compiled:
            found[name] = memory_of(compiled)["bytes_per_device"] + waiting + beside
        else:
            found[name] = max(needed_bytes(trouble, params) + waiting + beside, limit + 1)
    return found


def _programs(
    config: Any, program: Program, mesh: Mesh
) -> Iterator[tuple[str, jax.stages.Lowered, int]]:
    """Name, program, and bytes of a device that belong to it and are not in it."""
    model, stage = program.model, plan(config, program.model.banned_ids)[-1]
    graphdef, _ = models.abstract(model)
    places = sharding.shardings(program.state.params, mesh)
    params = jax.tree.map(_at, program.state.params, places)
    shards = sharding.row_shards(mesh)

    def rows(x: Any, *shape: int) -> Any:
        return _at(jax.ShapeDtypeStruct(shape, x.dtype), NamedSharding(mesh, sharding.ROWS))

    keys = config.batch
    images = abstract_batch(keys, model, stage.prompts, PROMPT, vision_frozen=False).vision
    vision = jax.tree.map(lambda x: rows(x, x.shape[0], *x.shape[2:]), images)
    features: Any = abstract_batch(keys, model, stage.prompts, PROMPT, vision_frozen=True).features
    all_features = math.prod(features.shape) * features.dtype.itemsize // shards
    pieces = math.gcd(stage.prompts // shards, config.rollout.pieces)
    groups, tokens = stage.prompts // pieces, keys.prompt_tokens
    ids = jnp.zeros((), jnp.int32)
    prompts = local.PaddedPrompts(
        *(rows(ids, groups, *shape) for shape in ((tokens,), (3, tokens), (tokens,), (tokens,)))
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        encode = models.encode.lower(
            graphdef, params, vision, math.gcd(stage.prompts // shards, keys.micro_batches)
        )
        yield "vision tower", encode, 0
        sample = local.sample.lower(
            graphdef,
            local.Ids(stop=(0, 1), banned=model.banned_ids, pad=0),
            stage.sampling,
            params,
            prompts,
            rows(features, groups, *features.shape[2:]),
            rows(jax.random.key(0), groups),
        )
        yield "sampler", sample, all_features


def _at(x: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
