import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.rl import tiny_update
from tests.rl.tiny_update import COMPLETION, CONFIG, FREEZE, GRPO, ROWS, SFT, TX, build, make_batch
from vtriune_jax import models, sharding
from vtriune_jax.errors import UserError
from vtriune_jax.optim import partition
from vtriune_jax.rl.update import init_state


def host(tree):
    """A copy that donation cannot take away."""
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def ratio(pair):
    return float(np.sum(pair[0]) / np.sum(pair[1]))


@pytest.fixture(scope="module")
def grpo():
    update, state, graphdef, _ = build()
    copy = host(state)
    return update, lambda: jax.tree.map(jnp.array, copy), graphdef


@pytest.fixture(scope="module")
def sft():
    return build(loss=SFT, freeze=())


def dense_logps(model, batch, features, banned):
    """[rows, 1, completion] by the shortest way: all logits, log_softmax, pick."""
    batch, features = jax.tree.map(jnp.asarray, (batch, features))
    hidden = model(batch.ids, batch.positions, batch.segments, features, batch.image_index)
    logits = (hidden @ model.head()).at[..., jnp.array(banned)].set(-jnp.inf)
    logps = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], batch.ids[:, 1:, None], 2)
    return logps[:, None, -COMPLETION:, 0]


def test_grpo_equals_a_plain_implementation(grpo):
    update, fresh, graphdef = grpo
    batch, state = make_batch(), fresh()
    before = host(state.params)

    def loss(language, visual):
        model = models.merge(graphdef, {"language": language, "visual": visual})
        logps = dense_logps(model, batch, batch.features[:, 0], CONFIG.banned_ids)
        r = jnp.exp(logps - batch.rollout_logps)
        clipped = jnp.clip(r, 0.8, 1.28)
        per_token = jnp.maximum(-batch.advantages * r, -batch.advantages * clipped)
        return jnp.where(batch.mask > 0, per_token, 0.0).sum() / batch.mask.sum()

    want, grads = jax.jit(jax.value_and_grad(loss))(before["language"], before["visual"])
    state, sums = update(state, batch)
    np.testing.assert_allclose(ratio(sums["loss"]), want, rtol=1e-5)
    np.testing.assert_allclose(ratio(sums["grad_norm"]), optax.tree.norm(grads), rtol=1e-5)
    assert 0 < ratio(sums["clip_fraction"]) < 1
    assert ratio(sums["kl"]) > 0

    @jax.jit
    def step(params, grads):
        changes, _ = TX.update(grads, TX.init(params), params)
        return optax.apply_updates(params, changes)

    expected = step({"language": before["language"]}, {"language": grads})
    for got, want in zip(
        jax.tree.leaves(state.params["language"]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_per_source_sums_count_the_trained_tokens(grpo):
    update, fresh, _ = grpo
    batch = make_batch()
    _, sums = update(fresh(), batch)
    counts = [batch.mask[batch.source == s].sum() for s in range(3)]
    for name in ("loss", "entropy", "clip_fraction", "kl", "rollout_gap"):
        np.testing.assert_array_equal(sums[name][1], counts)
    assert 0 < ratio(sums["entropy"]) <= np.log(60) + 1e-3


def test_frozen_parameters_stay_bit_for_bit_and_keep_no_moments(grpo):
    update, fresh, _ = grpo
    state = fresh()
    before = host(state.params)
    trained, _ = partition(before, FREEZE)
    assert jax.tree.structure(optax.tree.get(state.opt_state, "mu")) == jax.tree.structure(trained)
    state, _ = update(state, make_batch())
    assert_same(state.params["visual"], before["visual"])
    moved = [
        (a != b).any()
        for a, b in zip(
            *map(jax.tree.leaves, (state.params["language"], before["language"])), strict=True
        )
    ]
    assert all(moved)
    assert int(state.step) == 1


def test_the_state_is_donated(grpo):
    update, fresh, _ = grpo
    state = fresh()
    update(state, make_batch())
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_init_state_copies(grpo):
    params = jax.tree.map(jnp.array, tiny_update.model()[1])
    update, *_ = grpo
    update(init_state(params, TX, sharding.make_mesh(), FREEZE), make_batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("where", ["advantages", "features"])
def test_a_step_that_is_not_finite_is_skipped(grpo, where):
    update, fresh, _ = grpo
    state, _ = update(fresh(), make_batch(seed=1))
    before = host((state.params, state.opt_state))
    batch = make_batch()
    broken = dataclasses.replace(batch, **{where: np.full_like(getattr(batch, where), np.nan)})
    state, sums = update(state, broken)
    assert_same((state.params, state.opt_state), before)
    assert int(state.step) == 2
    assert ratio(sums["skipped"]) == 1.0
    for name, (total, count) in sums.items():
        assert np.isfinite(total).all(), name
        assert name == "skipped" or not np.any(count)
    state, sums = update(state, batch)
    assert ratio(sums["skipped"]) == 0.0
    assert np.isfinite(optax.tree.norm(state.params))


def test_a_batch_without_a_trained_token_is_skipped(grpo):
    update, fresh, _ = grpo
    state = fresh()
    before = host((state.params, state.opt_state))
    batch = make_batch()
    state, sums = update(state, dataclasses.replace(batch, mask=np.zeros_like(batch.mask)))
    assert_same((state.params, state.opt_state), before)
    assert ratio(sums["skipped"]) == 1.0


def test_the_order_of_rows_and_rows_of_padding_do_not_matter(grpo):
    update, fresh, _ = grpo
    batch = make_batch()
    want, want_sums = update(fresh(), batch)
    order = np.random.default_rng(1).permutation(ROWS)
    shuffled = jax.tree.map(lambda x: x[order], batch)
    # ids of padding are anything; its features too
    padding = make_batch(seed=9)
    zeros = {name: np.zeros_like(getattr(padding, name)) for name in ("segments", "mask")}
    padding = dataclasses.replace(padding, **zeros)
    padded = jax.tree.map(lambda a, b: np.concatenate([a, b]), batch, padding)
    for other in (shuffled, padded):
        got, sums = update(fresh(), other)
        for a, b in zip(
            jax.tree.leaves((got, sums)), jax.tree.leaves((want, want_sums)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_banned_tokens_of_a_completion_are_left_out(grpo):
    update, fresh, _ = grpo
    batch = make_batch()
    row, _, place = np.argwhere(batch.mask > 0)[-1]
    ids, mask = batch.ids.copy(), batch.mask.copy()
    ids[row, -COMPLETION + place] = CONFIG.image_token_id
    mask[row, 0, place] = 0.0
    _, got = update(fresh(), dataclasses.replace(batch, ids=ids))
    _, want = update(fresh(), dataclasses.replace(batch, ids=ids, mask=mask))
    assert_same(host(got), host(want))


def test_sft_trains_the_vision_tower_too(sft):
    update, state, graphdef, _ = sft
    batch = make_batch(vision=True)
    before = host(state.params)
    losses = []
    for _ in range(12):
        state, sums = update(state, batch)
        losses.append(ratio(sums["loss"]))
    model = models.merge(graphdef, jax.tree.map(jnp.asarray, before))
    features = model.encode(jax.tree.map(lambda x: jnp.asarray(x[:, 0]), batch.vision))
    logps = dense_logps(model, batch, features, CONFIG.banned_ids)
    expected = -jnp.where(batch.mask > 0, logps, 0.0).sum() / batch.mask.sum()
    np.testing.assert_allclose(losses[0], expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert (
        np.array(state.params["visual"]["patch_embed"]["kernel"])
        != before["visual"]["patch_embed"]["kernel"]
    ).any()


def test_rows_that_do_not_divide():
    update, state, *_ = build(micro_batches=3)
    with pytest.raises(UserError, match=re.escape("rows=8 is not divisible by micro_batches")):
        update(state, make_batch())


def test_a_mistaken_freeze_is_named():
    with pytest.raises(UserError, match="visual/blocks"):
        build(freeze=("^visual/block/",))


def test_the_chunked_head_changes_nothing(grpo):
    update, fresh, _ = grpo
    chunked, state, *_ = build(loss=dataclasses.replace(GRPO, max_logits=2 * ROWS * 64))
    want, got = update(fresh(), make_batch()), chunked(state, make_batch())
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
