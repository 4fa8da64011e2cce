"""Group rows = packed rows = single rows: loss, metrics and gradient of one update."""

import functools
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rl import tiny_update
from tests.rl.tiny_groups import GRIDS, SLOTS, SOURCES, make_group
from tests.rl.tiny_update import COMPLETION, CONFIG, FREEZE, SFT
from vtriune_jax import models, sharding
from vtriune_jax.data.packing import pack, stack_vision
from vtriune_jax.data.rows import KINDS, choose, needs
from vtriune_jax.rl import update as updates
from vtriune_jax.rl.losses import LossConfig
from vtriune_jax.rl.policy import make_logps, policy_logps
from vtriune_jax.rl.update import init_state, make_update

GROUPS = 4
GSPO = LossConfig(
    "gspo", 0.05, 0.05, 0.0, "sequence", "rollout", banned_ids=CONFIG.banned_ids, entropy_weight=0.1
)
DR = LossConfig(normalise="dr", old="rollout", room=COMPLETION, banned_ids=CONFIG.banned_ids)
CISPO = LossConfig("cispo", normalise="sequence", tis_cap=1.1, banned_ids=CONFIG.banned_ids)
REMEMBER = optax.chain(optax.trace(decay=0.0), optax.scale(0.0))
"""An optimizer that only keeps the gradient."""


@functools.cache
def updating(loss, freeze, micro_batches):
    graphdef, params = tiny_update.model()
    mesh = sharding.make_mesh()
    state = init_state(params, REMEMBER, mesh, freeze)
    copy = jax.tree.map(np.array, state)
    keys = {"num_sources": len(SOURCES), "freeze": freeze, "micro_batches": micro_batches}
    update = make_update(graphdef, REMEMBER, loss, mesh, state, **keys)
    return update, lambda: jax.tree.map(jnp.array, copy)


def gradient(batch, loss, freeze, micro_batches):
    """→ (gradient, sums)"""
    update, fresh = updating(loss, freeze, micro_batches)
    state, sums = update(fresh(), batch)
    return jax.device_get((state.opt_state[0].trace, sums))


def batches(groups, advantages, weights, vision_trained=False, unit=1):
    """The same completions in every kind of rows."""
    graphdef, params = tiny_update.model()
    features = None
    if not vision_trained:
        vision = stack_vision([group.prompt for group in groups], SLOTS)
        features = models.encode(graphdef, params, vision)
    asked = needs(groups, SLOTS, 1, unit)
    n = len(groups[0].completions)
    for kind in KINDS:
        rows = choose(kind, asked, SLOTS, len(groups), n, unit, CONFIG, vision_trained)
        yield (
            rows,
            pack(groups, advantages, weights, SOURCES, SLOTS, features, rows, 1, unit),
        )


def assert_equal(got, want, limit=1e-6):
    """To 1e-6: of the gradient's norm, also where a single parameter's is small (of keys' biases it
    is mere rounding); of a metric's value, or per token where it cancels."""
    whole = optax.tree.norm(want[0])
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b), got[0], want[0])
    assert optax.tree.norm(errors) <= limit * whole
    for error, leaf in zip(jax.tree.leaves(errors), jax.tree.leaves(want[0]), strict=True):
        assert error <= limit * max(np.linalg.norm(leaf), whole / 2)
    assert got[1].keys() == want[1].keys()
    for name, (total, count) in got[1].items():
        near = {"rtol": limit, "atol": limit * np.max(count), "err_msg": name}
        np.testing.assert_allclose(total, want[1][name][0], **near)
        np.testing.assert_array_equal(count, want[1][name][1], err_msg=name)


@st.composite
def drawn(draw, n):
    """Groups of any lengths and images, some completions of no weight."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    lengths = st.lists(st.integers(1, COMPLETION), min_size=n, max_size=n)
    groups = [
        make_group(
            rng,
            draw(st.integers(1, 4)),
            draw(st.sampled_from(GRIDS)),
            draw(lengths),
            draw(st.sampled_from(sorted(SOURCES))),
        )
        for _ in range(GROUPS)
    ]
    groups[0] = make_group(rng, 1, (), [COMPLETION] * n)  # one slot, so fewer shapes to compile
    weights = (rng.random((GROUPS, n)) < 0.8).astype(np.float32)
    weights[0, 0] = 1.0
    return groups, rng.normal(size=(GROUPS, n)).astype(np.float32), weights


@pytest.mark.parametrize(
    ("loss", "n", "micro_batches"),
    [(GSPO, 3, 1), (DR, 2, 2), (CISPO, 5, 1)],
    ids=["gspo", "dr, two pieces", "cispo, five"],
)
def test_gradients_do_not_depend_on_the_rows(loss, n, micro_batches, monkeypatch):
    """And each shape is traced once, and once more to learn of the results of a piece.

    In GSPO and packed rows the rounding of longer sums weighs more (seen: 1.2e-6).
    """
    kinds, traced = set(), []

    def counted(graphdef, params, batch, *more):
        traced.append((batch.ids.shape, batch.mask.shape, batch.predictors is None))
        return policy_logps(graphdef, params, batch, *more)

    monkeypatch.setattr(updates, "policy_logps", counted)

    @settings(max_examples=6, deadline=None, database=None, derandomize=True)
    @given(drawn(n))
    def check(case):
        (_, single), *others = batches(*case, unit=micro_batches)
        want = gradient(single, loss, FREEZE, micro_batches)
        for rows, batch in others:
            kinds.add((rows.kind, rows.n))
            limit = 1e-6 if rows.kind == "group" and loss.kind != "gspo" else 2e-6
            assert_equal(gradient(batch, loss, FREEZE, micro_batches), want, limit)

    check()
    assert set(Counter(traced).values()) == {1 if micro_batches == 1 else 2}
    assert ("group", n) in kinds
    assert {rows for kind, rows in kinds if kind == "packed"} & {2, 4}


def test_the_tower_is_trained_the_same_in_all_rows():
    rng = np.random.default_rng(0)
    groups = [make_group(rng, 2, grids, (2, 3, 1)) for grids in GRIDS]
    ones = np.ones((4, 3), np.float32)
    (_, single), (_, grouped), (rows, packed) = batches(groups, ones, ones, vision_trained=True)
    assert rows.n >= 2
    assert grouped.vision.patches.size == single.vision.patches.size / 3
    want = gradient(single, SFT, (), 1)
    assert np.abs(want[0]["visual"]["patch_embed"]["kernel"]).max() > 0
    for batch in (grouped, packed):
        assert_equal(gradient(batch, SFT, (), 1), want)


def test_log_probs_are_found_at_the_same_completions():
    """So that old and reference log-probs may be added to a batch of any rows."""
    rng = np.random.default_rng(0)
    groups = [make_group(rng, 2, grids, (6, 3, 1)) for grids in GRIDS]
    ones = np.ones((4, 3), np.float32)
    graphdef, params = tiny_update.model()
    logps = make_logps(graphdef, SFT, sharding.make_mesh())
    found = []
    for rows, batch in batches(groups, ones, ones):
        values = np.asarray(logps(params, batch))
        assert values.shape == batch.mask.shape == (len(batch.ids), rows.n, 6)
        masked = replace(batch, rollout_logps=values * batch.mask)
        by_sum = sorted(masked.rollout_logps.sum(-1)[batch.mask.any(-1)].tolist())
        found.append(by_sum)
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)
    assert len(found[0]) == 12
