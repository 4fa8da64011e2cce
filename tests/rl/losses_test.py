import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vtriune_jax.errors import UserError
from vtriune_jax.rl.losses import LossConfig, policy_gradient, sft
from vtriune_jax.rl.normalise import per_source
from vtriune_jax.types import Batch

LOGPS = jnp.log(jnp.array([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]]))
OLD = jnp.log(jnp.array([[0.5, 0.25, 0.8, 0.5], [0.2, 0.1, 0.4, 0.19]]))
ADVANTAGES = jnp.array([[1.0] * 4, [-1.0] * 4])
MASK = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
SOURCE = jnp.array([2, 0])
ENTROPY = jnp.ones_like(LOGPS)


def run(config, logps=LOGPS, old=OLD, advantages=ADVANTAGES, mask=MASK):
    """`old` are the log-probs of the sampler."""
    nothing = jnp.zeros(0)
    batch = Batch(nothing, nothing, nothing, nothing, mask, advantages, old, SOURCE)
    return policy_gradient(logps, ENTROPY, mask, batch, 3, config)


def test_grpo_by_hand():
    """Ratios 1, 2, 0.625 | 1, 2, 0.5, 1.0526, clip to [0.8, 1.28], pessimistic side."""
    sums = run(LossConfig(old="rollout"))
    good = -(1.0 + 1.28 + 0.625)
    bad = 1.0 + 2.0 + 0.8 + 0.2 / 0.19
    np.testing.assert_allclose(sums["loss"][0], [bad, 0.0, good], rtol=1e-6)
    np.testing.assert_array_equal(sums["loss"][1], [4.0, 0.0, 3.0])
    np.testing.assert_array_equal(sums["clip_fraction"][0], [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(sums["entropy"][0], [4.0, 0.0, 3.0])
    ratio = np.array([1.0, 2.0, 0.625])
    np.testing.assert_allclose(sums["kl"][0][2], (ratio - 1 - np.log(ratio)).sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["rollout_gap"][0][2], np.abs(np.log(ratio)).sum(), rtol=1e-5)


def test_current_has_ratio_one_and_the_policy_gradient():
    config = LossConfig(old="current")
    sums = run(config)
    np.testing.assert_array_equal(sums["kl"][0], 0.0)
    np.testing.assert_array_equal(sums["clip_fraction"][0], 0.0)
    assert sums["rollout_gap"][0][2] > 0
    grad = jax.grad(lambda x: run(config, logps=x)["loss"][0].sum())(LOGPS)
    np.testing.assert_allclose(grad, -ADVANTAGES * MASK, rtol=1e-6)


def test_the_clip_takes_the_gradient_only_on_the_far_side():
    config = LossConfig(old="rollout")
    grad = jax.grad(lambda x: run(config, logps=x)["loss"][0].sum())(LOGPS)
    ratio = jnp.exp(LOGPS - OLD)
    clipped = jnp.array([[0, 1, 0, 0], [0, 0, 1, 0]], bool)
    np.testing.assert_allclose(
        grad, jnp.where(clipped, 0.0, -ADVANTAGES * ratio * MASK), rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("junk", [np.inf, -np.inf, np.nan, 1e4])
def test_what_lies_under_the_mask_is_not_read(junk):
    config = LossConfig(old="rollout")
    old = jnp.where(MASK > 0, OLD, junk)
    advantages = jnp.where(MASK > 0, ADVANTAGES, junk)
    for got, want in zip(
        jax.tree.leaves(run(config, old=old, advantages=advantages)),
        jax.tree.leaves(run(config)),
        strict=True,
    ):
        np.testing.assert_array_equal(got, want)
    grad = jax.grad(lambda x: run(config, logps=x, old=old)["loss"][0].sum())(LOGPS)
    assert np.isfinite(grad).all()


def test_sft_is_the_cross_entropy_of_each_source():
    sums = sft(LOGPS, ENTROPY, MASK, SOURCE, 3)
    np.testing.assert_allclose(sums["loss"][0], [4 * np.log(5), 0.0, 3 * np.log(2)], rtol=1e-6)
    np.testing.assert_array_equal(sums["loss"][1], [4.0, 0.0, 3.0])


def test_fractional_masks_weigh():
    total, count = per_source(LOGPS * 0 + 3.0, MASK * 0.5, SOURCE, 3)
    np.testing.assert_array_equal(total, [6.0, 0.0, 4.5])
    np.testing.assert_array_equal(count, [2.0, 0.0, 1.5])


def test_greedy_completions_cannot_be_learned_from():
    with pytest.raises(UserError, match=r"temperature=0\.0"):
        LossConfig(temperature=0.0)
