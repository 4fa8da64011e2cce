import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vtriune_jax import optim
from vtriune_jax.errors import UserError

PARAMS = {
    "language": {
        "norm": {"scale": jnp.ones(2)},
        "layers": {
            "mlp": {"up": {"kernel": jnp.ones((2, 2))}},
            "attn": {"q": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}},
        },
    },
    "visual": {"blocks": {"attn": {"qkv": {"kernel": jnp.ones((2, 2))}}}},
}


def test_partition_and_combine_are_inverse():
    trained, frozen = optim.partition(PARAMS, ["^visual/"])
    assert list(trained) == ["language"]
    assert list(frozen) == ["visual"]
    assert jax.tree.all(jax.tree.map(np.array_equal, optim.combine(trained, frozen), PARAMS))
    trained, frozen = optim.partition(PARAMS, [])
    assert frozen == {}
    assert jax.tree.structure(optim.combine(trained, frozen)) == jax.tree.structure(PARAMS)


def test_a_regex_that_matches_nothing_names_the_nearest_paths():
    with pytest.raises(UserError, match=r"'\^visual/block/'.*visual/blocks"):
        optim.partition(PARAMS, ["^visual/block/"])
    with pytest.raises(UserError, match="not a regular expression"):
        optim.partition(PARAMS, ["("])
    with pytest.raises(UserError, match="all 5 parameters"):
        optim.partition(PARAMS, ["."])


def test_learning_rate_warms_up_from_the_first_step():
    config = optim.OptimConfig(learning_rate=2.0, warmup_steps=4)
    rates = [float(optim.learning_rate(config, step)) for step in range(6)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert float(optim.learning_rate(optim.OptimConfig(learning_rate=2.0), 0)) == 2.0


def test_weight_decay_leaves_norms_and_biases_alone():
    tx = optim.make_optimizer(optim.OptimConfig(learning_rate=1.0, weight_decay=0.1))
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    changes, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    changed = optax.apply_updates(PARAMS, changes)
    language = changed["language"]
    np.testing.assert_array_equal(language["norm"]["scale"], 1.0)
    np.testing.assert_array_equal(language["layers"]["attn"]["q"]["bias"], 1.0)
    np.testing.assert_allclose(language["layers"]["attn"]["q"]["kernel"], 0.9)


def test_the_gradient_is_clipped_by_its_global_norm():
    """Adam forgets the scale of one gradient, so compare its first moment."""
    config = optim.OptimConfig(clip_norm=1.0)
    tx = optim.make_optimizer(config)
    grads = jax.tree.map(lambda x: 10.0 * x, PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 0.1, rtol=1e-6)


def test_only_the_first_moment_may_be_narrow():
    states = {}
    for dtype in ("float32", "bfloat16"):
        config = optim.OptimConfig(learning_rate=0.1, mu_dtype=dtype)
        tx, params = optim.make_optimizer(config), PARAMS
        state = tx.init(params)
        for k in range(5):
            grads = jax.tree.map(lambda p, k=k: jnp.cos(k + p), params)
            changes, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, changes)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))} == {dtype}
        assert {leaf.dtype for leaf in jax.tree.leaves(optax.tree.get(state, "nu"))} == {
            jnp.dtype("float32")
        }
        states[dtype] = params
    narrow, wide = (jax.tree.leaves(states[dtype]) for dtype in ("bfloat16", "float32"))
    for a, b in zip(narrow, wide, strict=True):
        assert 0 < np.abs(a - b).max() < 0.01
