"""The training step: one jitted function from (state, batch) to (state, sums)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtriune_jax import sharding
from vtriune_jax.models import merge
from vtriune_jax.optim import combine, partition
from vtriune_jax.rl.logprobs import token_logps
from vtriune_jax.rl.losses import LossConfig, Sums, grpo, sft
from vtriune_jax.types import Batch, TrainState


def init_state(
    params: Any, tx: optax.GradientTransformation, mesh: Mesh, freeze: Sequence[str] = ()
) -> TrainState:
    """A state at step 0 on the mesh: a copy of `params`, and moments for the trained ones only."""
    params = jax.device_put(params, sharding.shardings(params, mesh), may_alias=False)

    def build(params):
        opt_state = tx.init(partition(params, freeze)[0])
        return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)

    places = sharding.shardings(jax.eval_shape(build, params), mesh)
    return jax.jit(build, out_shardings=places, donate_argnums=0)(params)


def make_update(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: LossConfig,
    mesh: Mesh,
    state: TrainState,
    *,
    num_sources: int,
    freeze: Sequence[str] = (),
    micro_batches: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """Build `update(state, batch) -> (state, sums)`; the state passed to it is donated.

    The loss is the mean over all trained tokens of the batch, wherever they lie: sums are gathered
    over micro-batches (a scan over parts of the rows) and devices, and divided once. `state` here
    only tells the shapes; `freeze` are the regexes given to `init_state`, whose parameters get no
    gradient and come back bit for bit.

    A step whose loss or gradient is not finite, or that has no trained token, changes neither
    parameters nor moments; `step` still advances. It reports `skipped` (1, 1) and nothing else:
    its other sums and counts are 0.

    `sums` has what the loss returns per source (see `losses`), and of shape []: `grad_norm` before
    the clip, and `skipped`. UserError at the first call if the rows of the batch do not divide
    by `micro_batches` × data × fsdp.
    """
    partition(state.params, freeze)  # a mistake in `freeze` shows here, not inside the jit
    places = sharding.shardings(state, mesh)
    trained_places, _ = partition(places.params, freeze)
    replicated, rows_place = NamedSharding(mesh, P()), NamedSharding(mesh, sharding.ROWS)

    def summed_loss(trained: dict, rest: dict, batch: Batch) -> tuple[jax.Array, Sums]:
        sums = _loss_sums(graphdef, combine(trained, rest), batch, loss, mesh, num_sources)
        return sums["loss"][0].sum(), sums

    def update(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        trained, rest = partition(state.params, freeze)

        def gradient(batch: Batch) -> tuple[dict, Sums]:
            grads, sums = jax.grad(summed_loss, has_aux=True)(trained, rest, batch)
            return jax.lax.with_sharding_constraint(grads, trained_places), sums

        grads, sums = _sum_over_micro_batches(gradient, batch, micro_batches)
        total, tokens = (x.sum() for x in sums["loss"])
        grads = jax.tree.map(lambda g: g / jnp.where(tokens > 0, tokens, 1.0), grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(total) & jnp.isfinite(norm) & (tokens > 0)

        changes, opt_state = tx.update(grads, state.opt_state, trained)
        trained, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (optax.apply_updates(trained, changes), opt_state),
            (trained, state.opt_state),
        )
        sums["grad_norm"] = norm, jnp.ones(())
        sums = jax.tree.map(lambda x: jnp.where(good, x, 0.0), sums)
        sums["skipped"] = 1.0 - good, jnp.ones(())
        return TrainState(state.step + 1, combine(trained, rest), opt_state), sums

    jitted = jax.jit(
        update,
        in_shardings=(places, rows_place),
        out_shardings=(places, replicated),
        donate_argnums=0,
    )

    def checked(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        sharding.check_rows(batch.ids.shape[0], mesh, micro_batches)  # before jit complains of it
        return jitted(state, jax.device_put(batch, rows_place))  # features may lie elsewhere

    return checked


def _loss_sums(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: Any,
    loss: LossConfig,
    mesh: Mesh,
    num_sources: int,
) -> Sums:
    """The loss of a `Batch` of tracers: hidden states, log-probs of the completions, sums."""
    model = merge(graphdef, _gather_table(params, mesh))
    features = batch.features if batch.vision is None else model.encode(batch.vision)
    hidden = model(batch.ids, batch.positions, batch.segments, features, batch.image_index)
    completion = batch.mask.shape[1]
    targets = batch.ids[:, -completion:]
    # Whole over fsdp before the chunks, not in each of them.
    head = jax.lax.with_sharding_constraint(model.head(), NamedSharding(mesh, P(None, "tensor")))
    logps, entropy = token_logps(
        hidden[:, -completion - 1 : -1],  # the state before a token is what predicts it
        head,
        targets,
        temperature=loss.temperature,
        banned_ids=loss.banned_ids,
        max_logits=loss.max_logits * sharding.row_shards(mesh),
    )
    mask = batch.mask
    if loss.banned_ids:
        mask = jnp.where(jnp.isin(targets, jnp.array(loss.banned_ids)), 0.0, mask)
    if loss.kind == "sft":
        return sft(logps, entropy, mask, batch.source, num_sources)
    advantages, old = batch.advantages, batch.rollout_logps
    return grpo(logps, entropy, mask, advantages, old, batch.source, num_sources, loss)


def _gather_table(params: Any, mesh: Mesh) -> Any:
    """The embedding table made whole over fsdp.

    A lookup in a table whose width is cut gives activations whose width is cut, and the partitioner
    then keeps them so through all layers, on all rows: the opposite of what fsdp is for.
    """
    table = params["language"]["embed"]["embedding"]
    table = jax.lax.with_sharding_constraint(table, NamedSharding(mesh, P("tensor", None)))
    language = params["language"] | {"embed": {"embedding": table}}
    return params | {"language": language}


def _sum_over_micro_batches(
    function: Callable[[Batch], Any], batch: Batch, micro_batches: int
) -> Any:
    if micro_batches == 1:
        return function(batch)
    # Every k-th row, so that a micro-batch lies on all devices as the batch does.
    split = batch.ids.shape[0] // micro_batches, micro_batches
    parts = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(*split, *x.shape[1:]), 0, 1), batch)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)),
    )

    def add(total, part):
        return jax.tree.map(jnp.add, total, function(part)), None

    return jax.lax.scan(add, zeros, parts)[0]
