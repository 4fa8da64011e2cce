"""The training step: one jitted function from (state, batch) to (state, sums)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from vtriune_jax import sharding
from vtriune_jax.models.pieces import split_rows
from vtriune_jax.optim import combine, partition
from vtriune_jax.rl.losses import LossConfig, policy_gradient, sft
from vtriune_jax.rl.normalise import Sums, add_sums
from vtriune_jax.rl.policy import as_rows, policy_logps
from vtriune_jax.types import Batch, TrainState


def init_state(
    params: Any,
    tx: optax.GradientTransformation,
    mesh: Mesh,
    freeze: Sequence[str] = (),
    *,
    donate: bool = False,
) -> TrainState:
    """A state at step 0 on the mesh: a copy of `params`, and moments for the trained ones only.

    With `donate` the state takes the memory of `params`, which must not be used any more.
    """
    places = sharding.shardings(params, mesh)
    params = jax.device_put(params, places, donate=donate, may_alias=None if donate else False)
    places = sharding.shardings(abstract_state(params, tx, freeze), mesh)
    build = partial(_first_state, tx=tx, freeze=freeze)
    return jax.jit(build, out_shardings=places, donate_argnums=0)(params)


def abstract_state(
    params: Any, tx: optax.GradientTransformation, freeze: Sequence[str] = ()
) -> TrainState:
    """The shapes of `init_state`'s result, for parameters that may be shapes only themselves."""
    return jax.eval_shape(partial(_first_state, tx=tx, freeze=freeze), params)


def _first_state(
    params: Any, *, tx: optax.GradientTransformation, freeze: Sequence[str]
) -> TrainState:
    opt_state = tx.init(partition(params, freeze)[0])
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=opt_state)


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

    The loss is the mean over the whole batch, as `loss.normalise` means it: sums are gathered over
    micro-batches (a scan over parts of the rows) and devices, and divided once. `state` here
    only tells the shapes; `freeze` are the regexes given to `init_state`, whose parameters get no
    gradient and come back bit for bit.

    A step whose loss or gradient is not finite, or that has no trained token, changes neither
    parameters nor moments; `step` still advances. It reports `skipped` (1, 1) and nothing else:
    its other sums and counts are 0.

    `sums` has what the loss returns per source (see `losses`), and of shape []: `grad_norm` before
    the clip, and `skipped`. UserError at the first call if the rows of the batch do not divide
    by `micro_batches` × data × fsdp.
    """
    jitted = jit_update(
        graphdef,
        tx,
        loss,
        mesh,
        state,
        num_sources=num_sources,
        freeze=freeze,
        micro_batches=micro_batches,
    )
    rows_place = NamedSharding(mesh, sharding.ROWS)

    def checked(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        sharding.check_rows(batch.ids.shape[0], mesh, micro_batches)  # before jit complains of it
        batch = jax.device_put(batch, rows_place)  # features may lie elsewhere
        with jax.transfer_guard("disallow"):  # whatever else came from the host would cost a wait
            return jitted(state, batch)

    return checked


def jit_update(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    loss: LossConfig,
    mesh: Mesh,
    state: TrainState,
    *,
    num_sources: int,
    freeze: Sequence[str] = (),
    micro_batches: int = 1,
) -> jax.stages.Wrapped:
    """The jitted function inside `make_update`, which `vtriune_jax.compile` lowers without arrays.

    `state` may hold shapes in place of arrays (`abstract_state`).
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

    return jax.jit(
        update,
        in_shardings=(places, rows_place),
        out_shardings=(places, replicated),
        donate_argnums=0,
    )


def _loss_sums(
    graphdef: nnx.GraphDef,
    params: Any,
    batch: Any,
    loss: LossConfig,
    mesh: Mesh,
    num_sources: int,
) -> Sums:
    """The loss of a `Batch` of tracers, as sums."""
    found = policy_logps(graphdef, params, batch, loss, mesh)
    logps, entropy, mask = (x.reshape(-1, x.shape[-1]) for x in found)
    batch = as_rows(batch)
    if loss.kind == "sft":
        return sft(logps, entropy, mask, batch.source, num_sources)
    return policy_gradient(logps, entropy, mask, batch, num_sources, loss)


def _sum_over_micro_batches(
    function: Callable[[Batch], tuple[dict, Sums]], batch: Batch, micro_batches: int
) -> tuple[dict, Sums]:
    if micro_batches == 1:
        return function(batch)
    parts = split_rows(batch, micro_batches)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts)),
    )

    def add(total, part):
        grads, sums = function(part)
        return (jax.tree.map(jnp.add, total[0], grads), add_sums(total[1], sums)), None

    return jax.lax.scan(add, zeros, parts)[0]
