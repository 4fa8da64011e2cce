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
from vtriune_jax.aot.program import (
    PROMPT,
    Program,
    abstract_batch,
    abstract_images,
    samples_here,
)
from vtriune_jax.rollout import local
from vtriune_jax.stages import Stage, plan


def sampling_bytes(config: Any, program: Program, mesh: Mesh, limit: int) -> dict[str, int]:
    """Bytes on a device while the tower encodes a step's images, and while the sampler draws.

    The optimizer's state, which waits meanwhile, and the images' features are included; above
    `limit` if it does not fit. A tower runs apart from the update if it is frozen or the last stage
    samples here.
    """
    stage = plan(config, program.model.banned_ids)[-1]
    params = param_bytes(program.state.params, mesh)
    waiting = param_bytes(program.state, mesh) - params
    found = {}
    for name, lowered, beside in _programs(config, stage, program, mesh):
        compiled, trouble = attempt(lowered)
        if compiled:
            found[name] = memory_of(compiled)["bytes_per_device"] + waiting + beside
        else:
            found[name] = max(needed_bytes(trouble, params) + waiting + beside, limit + 1)
    return found


def _programs(
    config: Any, stage: Stage, program: Program, mesh: Mesh
) -> Iterator[tuple[str, jax.stages.Lowered, int]]:
    """Name, program, and bytes of a device that belong to it and are not in it."""
    model, keys, prompts = program.model, config.batch, stage.prompts
    graphdef, _ = models.abstract(model)
    places = sharding.shardings(program.state.params, mesh)
    params = jax.tree.map(_at, program.state.params, places)

    def rows(x: Any, *shape: int) -> Any:
        return _at(jax.ShapeDtypeStruct(shape, x.dtype), NamedSharding(mesh, sharding.ROWS))

    vision = jax.tree.map(lambda x: rows(x, *x.shape), abstract_images(keys, model, prompts))
    features: Any = abstract_batch(keys, model, prompts, PROMPT, vision_frozen=True).features
    all_features = math.prod(features.shape) * features.dtype.itemsize // sharding.row_shards(mesh)
    here = samples_here(config, stage)
    earlier = (config.rollout.ahead + stage.refill) * all_features if here else 0
    groups = prompts // sharding.even_pieces(prompts, mesh, config.rollout.pieces)
    ids, tokens = jnp.zeros((), jnp.int32), keys.prompt_tokens
    padded = local.PaddedPrompts(
        *(rows(ids, groups, *shape) for shape in ((tokens,), (3, tokens), (tokens,), (tokens,)))
    )
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        if here or program.batch.features is not None:
            pieces = sharding.even_pieces(prompts, mesh, keys.micro_batches)
            yield "vision tower", models.encode.lower(graphdef, params, vision, pieces), earlier
        if not here:
            return
        sample = local.sample.lower(
            graphdef,
            local.Ids(stop=(0, 1), banned=model.banned_ids, pad=0),
            stage.sampling,
            params,
            padded,
            rows(features, groups, *features.shape[2:]),
            rows(jax.random.key(0), groups),
        )
        yield "sampler", sample, earlier + all_features


def _at(x: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
