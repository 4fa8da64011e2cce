"""Training with adapters: only they get gradients, moments and changes."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.rl import tiny_update
from tests.rl.tiny_update import CONFIG, FREEZE, GRPO, SFT, TX, make_batch
from vtriune_jax import models, sharding
from vtriune_jax.models import LoRAConfig, lora, weights
from vtriune_jax.rl.update import init_state, make_update

# Widths of matrices that no activation and no adapter has.
TEXT = replace(CONFIG.text, mlp=56, vocab=80)
LORA = replace(CONFIG, text=TEXT, lora=LoRAConfig(rank=4, alpha=8.0))
MATRICES = {(32, 32), (32, 16), (32, 56), (32, 80)}


def build(loss=SFT, freeze=(lora.BASE,), config=LORA):
    return tiny_update.build(loss=loss, freeze=freeze, config=config)


def flat(tree):
    return {path: np.array(leaf) for path, leaf in weights.flatten(tree).items()}


def products(update, state):
    """Shapes of all results of matrix products in the compiled update, smaller side first."""
    compiled = jax.jit(update).lower(state, make_batch()).compile().as_text()
    found = re.findall(r"= f32\[(\d+),(\d+)\]\S* dot\(", compiled)
    return {tuple(sorted(map(int, sides))) for sides in found}


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_gradient_of_the_base_is_computed(optimised, remat):
    config = replace(LORA, remat=remat)
    adapters_only, state, *_ = build(config=config)
    wanted = {tuple(sorted(shape)) for shape in MATRICES}
    assert not wanted & products(adapters_only, state)
    everything, state, *_ = build(config=config, freeze=FREEZE)
    assert wanted <= products(everything, state)


@pytest.mark.parametrize("loss", [SFT, GRPO], ids=["sft", "grpo"])
def test_only_adapters_learn(loss):
    update, state, *_ = build(loss)
    before = flat(state.params)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    size = sum(leaf.size for path, leaf in before.items() if lora.is_adapter(path))
    assert sum(leaf.size for leaf in moments) == 2 * size
    losses = []
    for _ in range(6):
        state, sums = update(state, make_batch())
        losses.append(float(np.sum(sums["loss"][0]) / np.sum(sums["loss"][1])))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.01
    for path, leaf in flat(state.params).items():
        assert np.array_equal(leaf, before[path]) == (not lora.is_adapter(path)), path


def test_a_bfloat16_base_stays_one():
    """The frozen matrices may be of half the size; the update is that of their float32 twins."""
    config = replace(LORA, dtype="bfloat16")
    graphdef, params = models.split(models.init(config, seed=0))
    narrow = weights.unflatten(
        {
            path: leaf if lora.is_adapter(path) else leaf.astype(jnp.bfloat16)
            for path, leaf in weights.flatten(params).items()
        }
    )
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    mesh = sharding.make_mesh()
    results = []
    for start in (narrow, wide):
        state = init_state(start, TX, mesh, (lora.BASE,))
        update = make_update(graphdef, TX, SFT, mesh, state, num_sources=3, freeze=(lora.BASE,))
        for _ in range(3):
            state, _ = update(state, make_batch())
        results.append(weights.flatten(state.params))
    for path, leaf in results[0].items():
        assert leaf.dtype == ("float32" if lora.is_adapter(path) else "bfloat16")
        np.testing.assert_allclose(leaf, results[1][path], rtol=0, atol=1e-4)
