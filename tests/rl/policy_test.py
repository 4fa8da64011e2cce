"""Log-probs without an update: those of the update, in any layout, with and without adapters."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import tiny_update
from tests.rl.tiny_update import CONFIG, FREEZE, GRPO, make_batch
from vtriune_jax import models, sharding
from vtriune_jax.models import LoRAConfig, lora, weights
from vtriune_jax.optim import OptimConfig, make_optimizer
from vtriune_jax.rl.policy import make_logps
from vtriune_jax.rl.update import init_state, make_update

LORA = replace(CONFIG, lora=LoRAConfig(rank=2, alpha=4.0))


def dense(graphdef, params, batch):
    """All logits, log_softmax, pick."""
    model = models.merge(graphdef, jax.tree.map(jnp.asarray, params))
    batch = jax.tree.map(jnp.asarray, batch)
    features = batch.features[:, 0]
    hidden = model(batch.ids, batch.positions, batch.segments, features, batch.image_index)
    logits = (hidden @ model.head()).at[..., jnp.array(CONFIG.banned_ids)].set(-jnp.inf)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], batch.ids[:, 1:, None], 2)
    return np.where(batch.mask > 0, logps[:, None, -batch.mask.shape[2] :, 0], 0.0)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_they_are_the_dense_ones(micro_batches):
    graphdef, params = tiny_update.model()
    batch = make_batch()
    logps = make_logps(graphdef, GRPO, sharding.make_mesh(), micro_batches=micro_batches)
    got = np.where(batch.mask > 0, logps(params, batch), 0.0)
    np.testing.assert_allclose(got, dense(graphdef, params, batch), rtol=1e-4, atol=1e-5)


def test_before_the_first_update_the_ratio_to_them_is_one():
    loss = replace(GRPO, old="recomputed")
    update, state, graphdef, mesh = tiny_update.build(loss=loss)
    batch = make_batch()
    logps = make_logps(graphdef, loss, mesh)(state.params, batch)
    _, sums = update(state, replace(batch, old_logps=logps))
    assert np.sum(sums["kl"][0]) == pytest.approx(0.0, abs=1e-5)
    assert not np.sum(sums["clip_fraction"][0])


def test_without_adapters_they_are_those_of_the_base():
    graphdef, params = tiny_update.model(LORA)
    rng = np.random.default_rng(0)
    moved = weights.unflatten(
        {
            path: rng.normal(size=leaf.shape).astype(np.float32) if lora.is_adapter(path) else leaf
            for path, leaf in weights.flatten(params).items()
        }
    )
    mesh, batch = sharding.make_mesh(), make_batch()
    with_them = make_logps(graphdef, GRPO, mesh)
    without = make_logps(graphdef, GRPO, mesh, adapters=False)
    start = with_them(params, batch)  # B = 0: still the base
    assert np.abs(with_them(moved, batch) - start).max() > 0.01
    np.testing.assert_allclose(without(moved, batch), start, rtol=1e-5, atol=1e-5)


def test_an_entropy_bonus_raises_the_entropy():
    """With no advantage and no other term, gradient steps only spread the distribution."""
    loss = replace(GRPO, entropy_weight=1.0)
    update, state, *_ = tiny_update.build(loss=loss)
    batch = replace(make_batch(), advantages=np.zeros_like(make_batch().advantages))
    entropies = []
    for _ in range(4):
        state, sums = update(state, batch)
        entropies.append(np.sum(sums["entropy"][0]) / np.sum(sums["entropy"][1]))
    assert entropies == sorted(entropies)
    assert entropies[-1] > entropies[0] + 0.01


def test_a_penalty_pulls_back_to_the_reference():
    loss = replace(GRPO, kl_weight=1.0)
    graphdef, params = tiny_update.model()
    mesh = sharding.make_mesh()
    batch = make_batch()
    batch = replace(batch, advantages=np.zeros_like(batch.advantages))
    reference = make_logps(graphdef, loss, mesh)(params, batch) + 0.5 * batch.mask
    tx = make_optimizer(OptimConfig(learning_rate=1e-3, eps=1e-2))
    state = init_state(params, tx, mesh, FREEZE)
    update = make_update(graphdef, tx, loss, mesh, state, num_sources=3, freeze=FREEZE)
    distances = []
    for _ in range(4):
        state, sums = update(state, replace(batch, reference_logps=reference))
        distances.append(np.sum(sums["reference_kl"][0]))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]
