"""What training holds on a device during an update, beside what the update is called with."""

from __future__ import annotations

from math import prod
from typing import Any

import jax
from jax.sharding import Mesh

from vtriune_jax import sharding
from vtriune_jax.stages import Stage
from vtriune_jax.types import Batch


def held_bytes(
    stage: Stage, layout: str, ahead: int, reference: Any, batch: Batch, mesh: Mesh
) -> int:
    """At most so many on each device; `batch` is the abstract one of one update.

    The parameters of the `reference` model, if there is one (else None); of a frozen vision tower
    the features of all prompts, of so many steps `ahead`, those of other minibatches, and of packed
    rows, which have a prompt for each completion, more than the ones in `batch`.
    """
    held = param_bytes(reference, mesh)
    if batch.features is not None:
        of_prompt = prod(batch.features.shape[2:]) * batch.features.dtype.itemsize
        sequences = stage.prompts * max(1, stage.samples) // stage.minibatches
        inside = prod(batch.features.shape[:2])
        most = max(inside, sequences if layout in ("auto", "packed") else 0)
        prompts = (1 + ahead) * stage.prompts + most - inside
        if stage.minibatches > 1:
            prompts += most * stage.minibatches
        held += prompts * of_prompt // sharding.row_shards(mesh)
    return held


def param_bytes(tree: Any, mesh: Mesh) -> int:
    """Bytes on one device of parameters, or of a tree that holds some, where they lie by rule."""
    places = jax.tree.leaves(sharding.shardings(tree, mesh))
    return sum(
        prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(tree), places, strict=True)
    )
