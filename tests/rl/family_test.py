"""Every loss of the family against loops over rows and tokens, value and gradient."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.rl.losses import LossConfig, policy_gradient
from vtriune_jax.rl.normalise import add_sums
from vtriune_jax.rl.ratios import RATIO_EDGES
from vtriune_jax.types import Batch

ROWS, SLOT, SOURCES = 7, 6, 3
RNG = np.random.default_rng(3)
LOGPS = RNG.normal(-2.0, 0.5, (ROWS, SLOT))
OLD, REFERENCE = (LOGPS + RNG.normal(0.0, 0.8, LOGPS.shape) for _ in range(2))
ROLLOUT = OLD + RNG.normal(0.0, 0.4, LOGPS.shape)
ENTROPY = RNG.uniform(0.1, 3.0, LOGPS.shape)
ADVANTAGES = np.repeat(RNG.normal(0.0, 1.0, (ROWS, 1)), SLOT, 1)
LENGTHS = (6, 1, 4, 0, 3, 5, 2)
MASK = (np.arange(SLOT) < np.array(LENGTHS)[:, None]) * 1.0
SOURCE = np.array([0, 2, 2, 0, 0, 2, 0])

RECIPES = {
    "GRPO": LossConfig(old="recomputed", normalise="sequence", clip_high=0.2),
    "GRPO with KL": LossConfig(old="recomputed", normalise="sequence", kl_weight=0.5),
    "DAPO": LossConfig(old="recomputed"),
    "DAPO on-policy": LossConfig(old="current"),
    "to the rollout": LossConfig(old="rollout"),
    "V-Triune's script": LossConfig(old="recomputed", dual_clip=1.5, kl_weight=0.1, kl="mse"),
    "Dr.GRPO": LossConfig(old="recomputed", normalise="dr", clip_high=0.2),
    "GSPO": LossConfig("gspo", 0.1, 0.12, old="recomputed", normalise="sequence"),
    "GSPO, dual clip": LossConfig("gspo", 0.9, 0.9, 1.2, "token", "recomputed"),
    "CISPO": LossConfig("cispo", clip_low=1.0, clip_high=0.5, old="recomputed"),
    "CISPO on-policy": LossConfig("cispo", tis_cap=1.1),
    "TIS": LossConfig(old="recomputed", tis_cap=1.2, kl_weight=0.3, kl="k1"),
    "TIS on-policy": LossConfig(tis_cap=0.9, entropy_weight=0.05, normalise="dr"),
    "k2 and entropy": LossConfig(old="rollout", kl_weight=0.2, kl="k2", entropy_weight=0.1),
}


def batch_of(keep=slice(None), **changes):
    arrays = {
        **{name: np.zeros(0) for name in ("ids", "positions", "segments", "image_index")},
        "mask": MASK[keep],
        "advantages": ADVANTAGES[keep],
        "rollout_logps": ROLLOUT[keep],
        "source": SOURCE[keep],
        "old_logps": OLD[keep],
        "reference_logps": REFERENCE[keep],
    }
    return Batch(**arrays | changes)


def run(config, logps=LOGPS, entropy=ENTROPY, batch=None):
    batch = jax.tree.map(jnp.asarray, batch or batch_of())
    return policy_gradient(
        jnp.asarray(logps), jnp.asarray(entropy), batch.mask, batch, SOURCES, config
    )


def by_hand(c: LossConfig):
    """Sums and counts by source, the gradients to log-probs and entropies, and the shares."""
    totals, counts, shares = np.zeros(SOURCES), np.zeros(SOURCES), {"clip": 0, "dual": 0}
    gradient, entropy_gradient = np.zeros_like(LOGPS), np.zeros_like(LOGPS)
    for i, length in enumerate(LENGTHS):
        if not length:
            continue
        per_token = {"token": 1.0, "sequence": 1 / length, "dr": 1.0}[c.normalise]
        counts[SOURCE[i]] += {"token": length, "sequence": 1, "dr": SLOT}[c.normalise]
        old = {"current": LOGPS, "recomputed": OLD, "rollout": ROLLOUT}[c.old]
        sequence = math.exp(sum(LOGPS[i, t] - old[i, t] for t in range(length)) / length)
        for t in range(length):
            a, logp = ADVANTAGES[i, t], LOGPS[i, t]
            r = sequence if c.kind == "gspo" else math.exp(logp - old[i, t])
            inside = min(max(r, 1 - c.clip_low), 1 + c.clip_high)
            if c.kind == "cispo":
                loss, slope, clipped, dual = -inside * a * logp, -inside * a, inside != r, False
            else:
                loss, slope = -a * r, -a * r
                clipped = -a * inside > loss
                if clipped:
                    loss, slope = -a * inside, 0.0
                dual = bool(c.dual_clip) and a < 0 and loss > -a * c.dual_clip
                if dual:
                    loss, slope = -a * c.dual_clip, 0.0
            weight = min(math.exp(old[i, t] - ROLLOUT[i, t]), c.tis_cap) if c.tis_cap else 1.0
            loss, slope = loss * weight, slope * weight
            d = REFERENCE[i, t] - logp
            kl, kl_slope = {
                "k1": (-d, 1.0),
                "k2": (d * d / 2, -d),
                "mse": (d * d / 2, -d),
                "k3": (math.exp(d) - 1 - d, 1 - math.exp(d)),
            }[c.kl]
            loss += c.kl_weight * kl - c.entropy_weight * ENTROPY[i, t]
            totals[SOURCE[i]] += per_token * loss
            gradient[i, t] = per_token * (slope + c.kl_weight * kl_slope)
            entropy_gradient[i, t] = -per_token * c.entropy_weight
            shares["clip"] += clipped
            shares["dual"] += dual
    return totals, counts, gradient, entropy_gradient, shares


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("name", RECIPES)
def test_values_and_gradients_are_those_of_the_loops(name):
    config = RECIPES[name]
    totals, counts, gradient, entropy_gradient, shares = by_hand(config)
    sums = run(config)
    np.testing.assert_allclose(sums["loss"][0], totals, rtol=1e-6)
    np.testing.assert_allclose(sums["loss"][1], counts, rtol=1e-12)
    np.testing.assert_allclose(sums["clip_fraction"][0].sum(), shares["clip"])
    if config.dual_clip:
        np.testing.assert_allclose(sums["dual_clip_fraction"][0].sum(), shares["dual"])
        assert shares["dual"]
    assert shares["clip"] or config.old == "current"

    def loss(logps, entropy):
        return run(config, logps, entropy)["loss"][0].sum()

    got = jax.grad(loss, (0, 1))(jnp.asarray(LOGPS), jnp.asarray(ENTROPY))
    np.testing.assert_allclose(got[0], gradient, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(got[1], entropy_gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", RECIPES)
def test_sums_of_the_parts_are_the_sums_of_the_whole(name):
    config, whole = RECIPES[name], run(RECIPES[name])
    parts = [slice(0, 3), slice(3, 4), slice(4, None)]
    found = [run(config, LOGPS[part], ENTROPY[part], batch_of(part)) for part in parts]
    total = add_sums(add_sums(found[0], found[1]), found[2])
    for name in whole:
        np.testing.assert_allclose(total[name], whole[name], rtol=1e-6, atol=1e-9, err_msg=name)


def test_the_statistics_of_the_rollout_ratio_are_raw():
    sums = run(RECIPES["TIS"])
    ratio = np.exp(OLD - ROLLOUT)
    for source in range(SOURCES):
        own = ratio[(MASK > 0) & (source == SOURCE)[:, None]]
        for name, expected in (
            ("rollout_ratio", own.sum()),
            ("rollout_ratio_max", own.max() if own.size else 0.0),
            ("rollout_ratio_from_0_to_0.5", (own < 0.5).sum()),
            ("rollout_ratio_from_1.25_to_2", ((own >= 1.25) & (own < 2)).sum()),
            ("rollout_ratio_from_2_to_inf", (own >= 2).sum()),
        ):
            np.testing.assert_allclose(sums[name][0][source], expected, rtol=1e-6)
    bins = [name for name in sums if "_from_" in name]
    assert len(bins) == len(RATIO_EDGES) + 1
    assert sum(sums[name][0].sum() for name in bins) == MASK.sum()
    np.testing.assert_array_equal(sums["rollout_ratio_max"][1], [1, 0, 1])
    assert not [name for name in run(RECIPES["DAPO"]) if "_from_" in name]


@pytest.mark.parametrize("gap", [1e4, -1e4])
@pytest.mark.parametrize("name", ["TIS", "V-Triune's script", "GSPO", "GSPO, dual clip", "CISPO"])
def test_far_apart_models_give_finite_numbers(name, gap):
    signs = np.arange(ROWS)[:, None] % 3 - 1
    far = batch_of(
        reference_logps=LOGPS + gap,
        old_logps=ROLLOUT + gap,
        advantages=signs * np.abs(ADVANTAGES),
    )
    config = dataclasses.replace(RECIPES[name], kl="k3")
    grad = jax.grad(lambda x: run(config, x, batch=far)["loss"][0].sum())(jnp.asarray(LOGPS))
    assert np.isfinite(grad).all()
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(config, batch=far)))


@pytest.mark.parametrize("junk", [np.inf, np.nan])
@pytest.mark.parametrize("name", ["TIS", "GSPO", "CISPO", "k2 and entropy"])
def test_what_lies_under_the_mask_is_not_read(name, junk):
    def under(values):
        return np.where(MASK > 0, values, junk)

    dirty = batch_of(
        old_logps=under(OLD), reference_logps=under(REFERENCE), rollout_logps=under(ROLLOUT)
    )

    def loss(logps, batch):
        return run(RECIPES[name], logps, batch=batch)["loss"][0].sum()

    for got, want in zip(
        jax.value_and_grad(loss)(jnp.asarray(LOGPS), dirty),
        jax.value_and_grad(loss)(jnp.asarray(LOGPS), batch_of()),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)


def test_old_log_probs_that_are_not_known_are_the_current_ones():
    unknown = batch_of(old_logps=np.full_like(OLD, np.nan))

    def loss(old, logps):
        config = dataclasses.replace(RECIPES["TIS"], old=old)
        return run(config, logps, batch=unknown)["loss"][0].sum()

    got, want = (jax.value_and_grad(partial(loss, old))(LOGPS) for old in ("recomputed", "current"))
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_array_equal(got[1], want[1])
    assert np.any(got[1])


def test_missing_log_probs_are_named():
    with pytest.raises(ValueError, match=r"needs batch\.old_logps"):
        run(RECIPES["DAPO"], batch=batch_of(old_logps=None))
    with pytest.raises(ValueError, match=r"needs batch\.reference_logps"):
        run(RECIPES["k2 and entropy"], batch=batch_of(reference_logps=None))


def test_importance_weights_to_the_sampler_itself_are_a_mistake():
    with pytest.raises(UserError, match='set old="recomputed", or tis_cap=0'):
        LossConfig(old="rollout", tis_cap=2.0)
