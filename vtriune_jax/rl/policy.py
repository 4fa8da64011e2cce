"""Log-probs of a batch's completions under given parameters, inside a jit and as one of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from vtriune_jax import sharding
from vtriune_jax.models import lora, merge
from vtriune_jax.models.layers import gather
from vtriune_jax.models.pieces import map_rows
from vtriune_jax.models.weights import flatten, unflatten
from vtriune_jax.rl.logprobs import token_logps
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.types import Batch

Logps = Callable[[Any, Batch], Float[Array, "rows n completion"]]


def make_logps(
    graphdef: nnx.GraphDef,
    loss: LossConfig,
    mesh: Mesh,
    *,
    micro_batches: int = 1,
    adapters: bool = True,
) -> Logps:
    """Build `logps(params, batch)`: what the update calls log p, without its gradient.

    For `batch.old_logps` and `batch.reference_logps`. Without `adapters` they are those of the base
    of a model with LoRA. UserError at a call as from the update.
    """
    rows_place = NamedSharding(mesh, sharding.ROWS)

    @jax.jit
    def whole(params: Any, batch: Batch) -> Float[Array, "rows n completion"]:
        params = params if adapters else _without_adapters(params)

        def logps(batch: Batch) -> Float[Array, "rows n completion"]:
            return policy_logps(graphdef, params, batch, loss, mesh)[0]

        return map_rows(logps, batch, micro_batches)

    def checked(params: Any, batch: Batch) -> Float[Array, "rows n completion"]:
        sharding.check_rows(batch.ids.shape[0], mesh, micro_batches)
        return whole(params, jax.device_put(batch, rows_place))

    return checked


def policy_logps(
    graphdef: nnx.GraphDef, params: Any, batch: Any, loss: LossConfig, mesh: Mesh
) -> tuple[
    Float[Array, "rows n completion"],
    Float[Array, "rows n completion"],
    Float[Array, "rows n completion"],
]:
    """Of a `Batch` of tracers: log-probs of the completions, entropies, and the mask to use.

    The mask is the batch's without tokens that are never sampled. The entropy has a gradient only
    if the loss asks for it.
    """
    model = merge(graphdef, params)
    model = merge(graphdef, _gather_vocabulary(params, mesh, model.config.dtype))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # `models` asks for it
        features, image_index = _features(model, batch)
        hidden = model(
            batch.ids,
            batch.positions,
            batch.segments,
            features,
            image_index,
            slots=_slots(batch),
        )
        states, targets = _completions(hidden, batch)
        logps, entropy = _own_rows(
            partial(
                token_logps,
                temperature=loss.temperature,
                banned_ids=loss.banned_ids,
                max_logits=loss.max_logits,
                entropy_gradient=loss.entropy_weight != 0,
            ),
            mesh,
        )(states, model.head(), targets)
    mask = batch.mask
    if loss.banned_ids:
        banned = jnp.isin(targets, jnp.array(loss.banned_ids)).reshape(mask.shape)
        mask = jnp.where(banned, 0.0, mask)
    return logps.reshape(mask.shape), entropy.reshape(mask.shape), mask


def as_rows(batch: Batch) -> Batch:
    """What belongs to completions as the losses want it: a row for each, [rows · n, completion]."""
    names = ("mask", "advantages", "rollout_logps", "source", "old_logps", "reference_logps")
    arrays = {name: getattr(batch, name) for name in names}
    return replace(
        batch,
        **{
            name: array.reshape(-1, *array.shape[2:])
            for name, array in arrays.items()
            if array is not None
        },
    )


def _slots(batch: Any) -> tuple[int, int] | None:
    """The completion slots at the end of each row; None in packed rows."""
    _, n, completion = batch.mask.shape
    return (n, completion) if batch.predictors is None else None


def _features(model: Any, batch: Any) -> tuple[Array | None, Array]:
    """The features of a row's prompts one behind the other, and the index of tokens into them."""
    features = batch.features
    if batch.vision is not None:
        rows, n = batch.vision.segments.shape[:2]
        each = jax.tree.map(lambda x: x.reshape(rows * n, *x.shape[2:]), batch.vision)
        features = model.encode(each)
        features = features.reshape(rows, n, *features.shape[1:])
    if features is None:
        return None, batch.image_index
    rows, _, units, width = features.shape
    index = batch.image_index + jnp.where(batch.image_index >= 0, batch.segments - 1, 0) * units
    return features.reshape(rows, -1, width), index


def _completions(
    hidden: Float[Array, "rows tokens embed"], batch: Any
) -> tuple[Float[Array, "completions completion embed"], Int[Array, "completions completion"]]:
    """The states that predict the tokens of every completion, and these tokens.

    The state before a token is what predicts it: for the first one, the last of the prompt.
    """
    rows, n, size = batch.mask.shape
    if batch.predictors is not None:
        places = batch.predictors.reshape(rows, -1)
        states = jnp.take_along_axis(hidden, places[..., None], axis=1)
        targets = jnp.take_along_axis(batch.ids, places + 1, axis=1)
    else:
        own = hidden[:, -n * size :].reshape(rows, n, size, -1)
        last = jnp.broadcast_to(hidden[:, -n * size - 1, None, None], (rows, n, 1, own.shape[-1]))
        states = jnp.concatenate([last, own[:, :, :-1]], axis=2)
        targets = batch.ids[:, -n * size :]
    return states.reshape(rows * n, size, -1), targets.reshape(rows * n, size)


def _own_rows(logps: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`token_logps` by each device of the rows that lie there.

    So the gradient of the head is added up over devices once. The partitioner by itself would do
    that for every chunk of logits.
    """
    if sharding.row_shards(mesh) == 1:
        return logps
    rows = sharding.ROWS
    return jax.shard_map(
        logps,
        in_specs=(rows, P(), rows),
        out_specs=rows,
        axis_names=set(rows[0]),
        check_vma=False,
    )


def _without_adapters(params: Any) -> Any:
    flat = flatten(params)
    off = {path: jnp.zeros_like(leaf) for path, leaf in flat.items() if lora.is_adapter(path)}
    return unflatten(flat | off)


def _gather_vocabulary(params: Any, mesh: Mesh, dtype: str) -> Any:
    """The embedding table and the head made whole over fsdp, once for all that is done with them.

    A lookup in a table whose width is cut gives activations whose width is cut, and the partitioner
    then keeps them so through all layers, on all rows: the opposite of what fsdp is for. And the
    head would be gathered for every chunk of logits.
    """
    language = dict(params["language"])
    for name, leaf in (("embed", "embedding"), ("head", "kernel")):
        if name in language:
            matrix = language[name][leaf]
            cut = sharding.spec(f"language/{name}/{leaf}", matrix.shape, mesh)
            whole = P(*(None if axis == "fsdp" else axis for axis in cut))
            places = NamedSharding(mesh, whole), NamedSharding(mesh, cut)
            language[name] = {leaf: gather(matrix, dtype, *places)}
    return params | {"language": language}
